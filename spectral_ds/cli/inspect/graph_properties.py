"""What a parameter graph is like: size, degrees, components, spectrum, and roughness of weights.

In: a graph that one process holds whole, and the weights. Out: `GraphProperties` of any part of it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

from spectral_ds.cli.inspect.group_spectrum import (
    GroupSpectrum,
    distinct,
    laplacian_of,
    spectrum_of,
)
from spectral_ds.graph import Edges
from spectral_ds.laplacian import Group, ParameterGraph
from spectral_ds.sharding import Fragment, by_parameter

Values = npt.NDArray[np.float64]

# Elements of a block of columns in float64 (128 MiB).
BLOCK_ELEMENTS = 2**24
DEGREE_BINS = 32


@dataclass(frozen=True)
class Distribution:
    """Least, middle, mean and most of one number a node."""

    min: float
    median: float
    mean: float
    max: float

    @classmethod
    def of(cls, values: npt.NDArray[np.float64] | npt.NDArray[np.int64]) -> "Distribution":
        return cls(
            float(values.min()), float(np.median(values)), float(values.mean()), float(values.max())
        )


@dataclass(frozen=True)
class Roughness:
    """How fast weights change from a node to its neighbours.

    Attributes:
        weights: tr(Xᵀ L X)/tr(Xᵀ X); None where all weights are 0.
        random: what to expect if nodes kept their lengths and pointed anywhere:
            Σ L_ii ‖x_i‖²/Σ ‖x_i‖², which is 1 for the normalized Laplacian where all have edges.
        ratio: of both; 1 in a random basis, lower is smoother; None where there is no edge.
    """

    weights: float | None
    random: float | None
    ratio: float | None


@dataclass(frozen=True)
class GraphProperties:
    """What a part of a graph is like: all nodes of some parameters.

    Attributes:
        nodes: in it.
        edges: undirected, with at least one end in it.
        components: of the graph, that have nodes in it; of the whole graph, how often λ = 0.
        isolated: nodes without an edge.
        degree: sum of a node's weights.
        neighbours: their number.
        lambda_max_bound: of the whole graph.
        lambda_max: the largest eigenvalue of the groups of joined parameters that it belongs to.
        lowest_eigenvalues: of these groups, above 0, ascending, equal ones once; None if a solver
            has not converged.
        density: (bins,): share of these groups' eigenvalues in equal bins of [0, bound].
        degree_histogram: (bins,): number of nodes in equal bins of [0, the graph's largest degree].
        roughness: of the weights.
    """

    nodes: int
    edges: int
    components: int
    isolated: int
    degree: Distribution
    neighbours: Distribution
    lambda_max_bound: float
    lambda_max: float
    lowest_eigenvalues: list[float] | None
    density: list[float]
    degree_histogram: list[int]
    roughness: Roughness


@dataclass(frozen=True)
class _MeasuredGroup:
    """What was measured of one group of joined parameters.

    Attributes:
        names: of the parameters, in the order of the arrays.
        parameter: (nodes,): which parameter each node belongs to.
        degree, neighbours, component: (nodes,).
        between: (parameters, parameters): directed edges from one to the other.
        variation, random_variation, energy: (parameters,): tr Xᵀ L X, the same to expect of random
            directions, tr Xᵀ X.
    """

    names: list[str]
    parameter: npt.NDArray[np.int64]
    degree: Values
    neighbours: npt.NDArray[np.int64]
    component: npt.NDArray[np.int64]
    between: npt.NDArray[np.int64]
    variation: Values
    random_variation: Values
    energy: Values
    spectrum: GroupSpectrum


class InspectedGraph:
    """Measures a graph once; `properties` then tells what any part of it is like.

    Args:
        graph: that this process holds whole.
        weights: of the fragments, flat.
        fragments: one a parameter.
        eigenvalues: how many of the lowest are wanted.
        bins: of the density of states.
        seed: of random probes.
        progress: called with the number of parameters done since the last call.
    """

    def __init__(
        self,
        graph: ParameterGraph,
        weights: Sequence[torch.Tensor],
        fragments: Sequence[Fragment],
        *,
        eigenvalues: int,
        bins: int,
        seed: int,
        progress: Callable[[int], object],
    ) -> None:
        self.lambda_max_bound = graph.lambda_max
        self.max_degree = max((float(g.degree.max(initial=0)) for g in graph.groups), default=0.0)
        self.roles: dict[str, list[str]] = {}
        for parameter in graph.parameters:
            self.roles.setdefault(parameter.role, []).append(parameter.name)
        self._eigenvalues = eigenvalues
        self._groups = []
        for group in graph.groups:
            count, label = connected_components(_adjacency(group), directed=False)
            spectrum = spectrum_of(graph, group, label, count, eigenvalues, bins, seed)
            self._groups.append(_measured(graph, group, label, spectrum, weights, fragments))
            progress(len(group.parameters))

    def whole(self) -> GraphProperties:
        """Measure the whole graph."""
        return self.properties(name for names in self.roles.values() for name in names)

    def of_role(self, role: str) -> GraphProperties:
        """Measure the nodes of one role."""
        return self.properties(self.roles[role])

    def properties(self, names: Iterable[str]) -> GraphProperties:
        """Measure the nodes of some parameters, by their names."""
        chosen = set(names)
        parts = [
            (group, np.array([name in chosen for name in group.names]))
            for group in self._groups
            if chosen & set(group.names)
        ]
        nodes = [(group, here[group.parameter]) for group, here in parts]
        degree = np.concatenate([group.degree[here] for group, here in nodes])
        neighbours = np.concatenate([group.neighbours[here] for group, here in nodes])
        edges = sum(
            int(group.between.sum() - group.between[~here][:, ~here].sum()) for group, here in parts
        )
        spectra = [group.spectrum for group, _ in parts]
        counts = np.sum([spectrum.counts for spectrum in spectra], axis=0)
        bins = np.linspace(0, self.max_degree or 1.0, DEGREE_BINS + 1)
        return GraphProperties(
            nodes=len(degree),
            edges=edges // 2,
            components=sum(len(np.unique(group.component[here])) for group, here in nodes),
            isolated=int((neighbours == 0).sum()),
            degree=Distribution.of(degree),
            neighbours=Distribution.of(neighbours),
            lambda_max_bound=self.lambda_max_bound,
            lambda_max=max(spectrum.largest for spectrum in spectra),
            lowest_eigenvalues=self._lowest(spectra),
            density=(counts / counts.sum()).tolist(),
            degree_histogram=np.histogram(degree, bins)[0].tolist(),
            roughness=_roughness(parts),
        )

    def _lowest(self, spectra: Sequence[GroupSpectrum]) -> list[float] | None:
        found: list[Values] = []
        for spectrum in spectra:
            if spectrum.lowest is None:
                return None
            found.append(spectrum.lowest)
        merged = distinct(np.sort(np.concatenate(found)), self.lambda_max_bound)
        return [float(value) for value in merged[: self._eigenvalues]]


def _roughness(parts: Sequence[tuple[_MeasuredGroup, npt.NDArray[np.bool_]]]) -> Roughness:
    variation, random, energy = (
        sum(float(getattr(group, name)[here].sum()) for group, here in parts)
        for name in ("variation", "random_variation", "energy")
    )
    if energy == 0:
        return Roughness(None, None, None)
    ratio = variation / random if random > 0 else None
    return Roughness(variation / energy, random / energy, ratio)


def _adjacency(group: Group) -> csr_array:
    """W of a group; of depth paths, one of the equal ones."""
    edges, nodes = group.edges, group.bucket.nodes
    return coo_array((edges.weight, (edges.source, edges.target)), shape=(nodes, nodes)).tocsr()


def _measured(
    graph: ParameterGraph,
    group: Group,
    label: npt.NDArray[np.int32],
    spectrum: GroupSpectrum,
    weights: Sequence[torch.Tensor],
    fragments: Sequence[Fragment],
) -> _MeasuredGroup:
    laplacian = laplacian_of(group, graph.normalized)
    variation, energy = _quadratic_forms(laplacian, group, weights, fragments)
    count, copies = len(group.parameters), group.copies
    owner = np.repeat(np.arange(count), np.diff(group.bucket.first_node))
    edges: Edges = group.edges
    pairs = owner[edges.source] * count + owner[edges.target]
    between = np.bincount(pairs, minlength=count**2).reshape(count, count) * copies
    component = np.repeat(label.astype(np.int64) * copies, copies)
    return _MeasuredGroup(
        names=[parameter.name for parameter in group.parameters],
        parameter=np.repeat(owner, copies),
        degree=np.repeat(group.degree, copies),
        neighbours=np.repeat(np.bincount(edges.source, minlength=len(owner)), copies),
        component=component + np.tile(np.arange(copies), len(owner)),
        between=between,
        variation=_summed(variation, owner, count),
        random_variation=_summed(laplacian.diagonal() * energy, owner, count),
        energy=_summed(energy, owner, count),
        spectrum=spectrum,
    )


def _summed(values: Values, owner: npt.NDArray[np.int64], count: int) -> Values:
    """Sums of the values of each owner; (count,)."""
    return np.bincount(owner, values, count).astype(np.float64)


def _quadratic_forms(
    laplacian: csr_array,
    group: Group,
    weights: Sequence[torch.Tensor],
    fragments: Sequence[Fragment],
) -> tuple[Values, Values]:
    """x_i · (L X)_i and x_i · x_i of every node; both (nodes,)."""
    variation, energy = np.zeros(group.bucket.nodes), np.zeros(group.bucket.nodes)
    for piece in group.bucket.slices(BLOCK_ELEMENTS):
        x = np.zeros((piece.nodes, piece.width))
        for part in piece.rectangles(by_parameter(fragments)):
            columns = slice(part.column, part.column + part.columns)
            x[part.node : part.node + part.nodes, columns] = part.view(weights[part.fragment])
        variation += np.einsum("ij,ij->i", x, laplacian @ x)
        energy += np.einsum("ij,ij->i", x, x)
    return variation, energy
