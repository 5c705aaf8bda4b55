"""ParameterGraph: the weighted graph over all chosen parameters, sharded like them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array, csr_array, eye_array

from spectral_ds.geometry.buckets import Bucket, linked_parameters
from spectral_ds.geometry.owners import RowOwners, runs_of
from spectral_ds.graph import Depth, EdgeFamily, Edges, NodeKind, ParameterNodes
from spectral_ds.laplacian.adjacency import build_adjacency, degrees
from spectral_ds.laplacian.operator import laplacian_rows
from spectral_ds.sharding import Communicator, Fragment, ShardLayout
from spectral_ds.sketches import FeatureSource


@dataclass(frozen=True)
class Group:
    """Parameters that edges join, and their graph as this rank holds it.

    Attributes:
        parameters: as the graph's user sees them.
        bucket: the same, all columns. In a group of depth paths, where all nodes of a parameter
            have the same neighbours, each parameter is one node there.
        edges: from the nodes that this rank owns a part of; of paths, all edges.
        degree: (nodes,): of every node.
        owners: which ranks own a part of which node.
        is_path: whether it is a group of depth paths.
    """

    parameters: tuple[ParameterNodes, ...]
    bucket: Bucket
    edges: Edges
    degree: npt.NDArray[np.float64]
    owners: RowOwners
    is_path: bool

    @property
    def copies(self) -> int:
        """How many times the graph stands side by side: once for each node of a parameter."""
        return self.parameters[0].nodes if self.is_path else 1

    def primary_rows(self, rank: int) -> npt.NDArray[np.int64]:
        """The nodes that a rank answers for; each node has one such rank."""
        rows = np.arange(self.bucket.nodes)
        return np.asarray(rows[self.owners.primary(rows) == rank])

    def primary_edges(self, rank: int) -> Edges:
        """The edges from a rank's primary rows."""
        return self.edges.from_sources(self.primary_rows(rank))


class ParameterGraph:
    """Nodes, edges and Laplacian of the parameters that the plugin filters.

    Made by `ParameterGraph.build`. Counts are global and equal on all ranks.

    Attributes:
        parameters: name and shape of every parameter in the graph, in model order.
        groups: the same in sets that no edge leaves.
        num_nodes: number of nodes.
        num_edges: number of undirected edges.
        lambda_max: upper bound of the Laplacian's eigenvalues: 2 if normalized, else
            Gershgorin's bound 2 · max degree (1 if there are no edges).
        normalized: which Laplacian.
        only_paths: whether all groups are depth paths.
    """

    def __init__(
        self,
        parameters: Sequence[ParameterNodes],
        groups: Sequence[Group],
        normalized: bool,
        communicator: Communicator,
    ) -> None:
        self.parameters = tuple(parameters)
        self.groups = tuple(groups)
        self.normalized = normalized
        self.only_paths = all(group.is_path for group in groups)
        self.num_nodes = sum(parameter.nodes for parameter in parameters)
        self._communicator = communicator
        max_degree = max((float(group.degree.max(initial=0)) for group in groups), default=0.0)
        self.lambda_max = 2.0 if normalized else 2 * max_degree or 1.0
        rank = communicator.rank
        own = sum(len(group.primary_edges(rank)) * group.copies for group in groups)
        count = torch.tensor([own], device=communicator.device)
        self.num_edges = int(communicator.sum_(count).item()) // 2

    @classmethod
    def build(
        cls,
        parameters: Sequence[ParameterNodes],
        families: Sequence[EdgeFamily],
        layout: ShardLayout,
        features: Mapping[str, FeatureSource],
        communicator: Communicator,
        *,
        normalized: bool,
        progress: Callable[[int], object],
    ) -> "ParameterGraph":
        """Build the graph (collective on the communicator's group).

        Args:
            parameters: the parameters to cover, in model order, equal on all ranks.
            families: edge families.
            layout: the fragments of all ranks.
            features: by name, where similarity finds the features it compares.
            communicator: the ranks that share the parameters.
            normalized: the normalized or the combinatorial Laplacian.
            progress: called with the number of parameters done since the last call.
        """
        only_paths = all(isinstance(family, Depth) for family in families)
        groups = []
        for joined in linked_parameters(parameters, families):
            if only_paths:
                group = _path_group(joined, families, layout)
            else:
                bucket = Bucket.of(joined)
                owners = RowOwners.of(bucket, layout)
                edges = build_adjacency(bucket, families, owners, features, communicator)
                degree = degrees(bucket, edges, owners, communicator)
                group = Group(joined, bucket, edges, degree, owners, is_path=False)
            groups.append(group)
            progress(len(joined))
        return cls(parameters, groups, normalized, communicator)

    @classmethod
    def of_edges(
        cls,
        parameters: Sequence[ParameterNodes],
        families: Sequence[EdgeFamily],
        layout: ShardLayout,
        edges: Edges,
        communicator: Communicator,
        *,
        normalized: bool,
    ) -> "ParameterGraph":
        """A graph whose edges are known; no communication but to count.

        Args:
            edges: all edges, both directions, as `primary_edges` numbers nodes; depth paths need
                none.
            others: as in `build`.
        """
        only_paths = all(isinstance(family, Depth) for family in families)
        first_node, edges = _first_nodes(parameters), edges.by_source()
        groups = []
        for joined in linked_parameters(parameters, families):
            if only_paths:
                groups.append(_path_group(joined, families, layout))
                continue
            bucket = Bucket.of(joined)
            owners = RowOwners.of(bucket, layout)
            # The group's number of each of its nodes, by the number in the model; sorted by that.
            model = _in_model(joined, first_node)
            of_group = edges.from_ranges(
                [(first_node[p.name], first_node[p.name] + p.nodes) for p in joined]
            )
            all_edges = Edges(
                np.searchsorted(model, of_group.source),
                np.searchsorted(model, of_group.target),
                of_group.weight,
            ).combined(np.add)
            degree = np.bincount(all_edges.source, all_edges.weight, bucket.nodes)
            position, rank = owners.all_of(np.arange(bucket.nodes))
            own = all_edges.from_sources(position[rank == layout.rank])
            group = Group(joined, bucket, own, degree.astype(np.float64), owners, is_path=False)
            groups.append(group)
        return cls(parameters, groups, normalized, communicator)

    def primary_edges(self) -> Edges:
        """Edges from the nodes that this rank answers for; nodes are numbered in model order.

        Depth paths are left out: they follow from names and shapes.
        """
        first_node = _first_nodes(self.parameters)
        parts = []
        for group in self.groups:
            if not group.is_path:
                model = _in_model(group.parameters, first_node)
                own = group.primary_edges(self._communicator.rank)
                parts.append(Edges(model[own.source], model[own.target], own.weight))
        return Edges.concatenate(parts)

    def of_groups(self, groups: Sequence[Group]) -> "ParameterGraph":
        """The part of the graph that some of its groups make, with the same λ_max."""
        parameters = [parameter for group in groups for parameter in group.parameters]
        part = ParameterGraph(parameters, groups, self.normalized, self._communicator)
        part.lambda_max = self.lambda_max
        return part

    def of_node_signals(self, columns: Mapping[str, int], layout: ShardLayout) -> "ParameterGraph":
        """The graph for signals that hold some columns for each node, in place of parameters.

        Args:
            columns: of a parameter's nodes, equal for joined parameters.
            layout: who owns which part of the (nodes × columns) matrices, as if they were
                parameters; each row has one owner, its primary rank.
        """
        groups = []
        for group in self.groups:
            kind: NodeKind = "parameter" if group.is_path else "row"
            bucket = Bucket.of(
                [
                    ParameterNodes(p.name, (p.nodes, columns[p.name]), kind, p.role, p.block)
                    for p in group.parameters
                ]
            )
            owners = RowOwners.of(bucket, layout)
            edges = group.edges if group.is_path else group.primary_edges(layout.rank)
            groups.append(replace(group, bucket=bucket, owners=owners, edges=edges))
        return self.of_groups(groups)

    def primary_layout(self, columns: int, world_size: int) -> ShardLayout:
        """Who answers for which rows of (nodes × columns) matrices; not for depth paths."""
        fragments: list[list[Fragment]] = [[] for _ in range(world_size)]
        for group in self.groups:
            primary = group.owners.primary(np.arange(group.bucket.nodes))
            bounds = pairwise(group.bucket.first_node.tolist())
            for parameter, (start, end) in zip(group.parameters, bounds, strict=True):
                for first, last, rank in runs_of(primary[start:end]):
                    run = Fragment(parameter.name, first * columns, (last - first) * columns)
                    fragments[rank].append(run)
        return ShardLayout(tuple(map(tuple, fragments)), self._communicator.rank)

    def describe(self) -> str:
        """One sentence for people: size, degree, Laplacian."""
        kind = "normalized" if self.normalized else "combinatorial"
        mean_degree = 2 * self.num_edges / self.num_nodes
        return (
            f"{self.num_nodes:,} nodes and {self.num_edges:,} edges over "
            f"{len(self.parameters)} parameters, mean degree {mean_degree:.1f} edges; {kind} "
            f"Laplacian, eigenvalues in [0, {self.lambda_max:.4g}]"
        )

    def degree_histogram(
        self, bins: int
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(counts, edges) of the nodes' degrees in equal bins from 0, on every rank."""
        highest = max(float(group.degree.max(initial=0)) for group in self.groups)
        edges = np.linspace(0, highest or 1.0, bins + 1)
        counts = np.zeros(bins)
        for group in self.groups:
            counts += np.histogram(group.degree, edges)[0] * group.copies
        return counts, edges

    def weight_histogram(
        self, bins: int
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(counts, edges) of the edges' weights in equal bins from 0 (collective)."""
        own = [group.primary_edges(self._communicator.rank).weight for group in self.groups]
        highest = self._communicator.maximum(max(float(w.max(initial=0)) for w in own))
        edges = np.linspace(0, highest or 1.0, bins + 1)
        counts = np.zeros(bins)
        for group, weights in zip(self.groups, own, strict=True):
            counts += np.histogram(weights, edges)[0] * group.copies / 2
        total = torch.from_numpy(counts).to(self._communicator.device)
        return self._communicator.sum_(total).cpu().numpy(), edges

    def laplacian(self, parameter_names: Sequence[str] | None = None) -> csr_array:
        """The global Laplacian, gathered on every rank: for study and tests of small models.

        Args:
            parameter_names: parameters whose rows to return, in this order; all by default.

        Returns:
            (n, n) float64: the rows and columns of these parameters' nodes, parameter after
            parameter. Collective on the communicator's group; equal on all ranks.

        Raises:
            ValueError: a name is not in the graph.
        """
        offset: dict[str, int] = {}
        first = 0
        for group in self.groups:
            for parameter in group.parameters:
                offset[parameter.name] = first
                first += parameter.nodes
        names = list(offset) if parameter_names is None else list(parameter_names)
        if parameter_names is None:
            names = [parameter.name for parameter in self.parameters]
        for name in names:
            if name not in offset:
                raise ValueError(
                    f"parameter {name!r} is not in the graph; it has: {', '.join(offset)}"
                )
        adjacency = self._gather_adjacency()
        degree = np.bincount(adjacency.row, adjacency.data, self.num_nodes).astype(np.float64)
        rows = np.arange(self.num_nodes)
        edges = Edges(
            adjacency.row.astype(np.int64), adjacency.col.astype(np.int64), adjacency.data
        )
        laplacian = laplacian_rows(edges, degree, rows, self.normalized).tocsr()
        nodes_of = {parameter.name: parameter.nodes for parameter in self.parameters}
        chosen = np.concatenate(
            [np.arange(offset[name], offset[name] + nodes_of[name]) for name in names]
        )
        selection = csr_array(eye_array(self.num_nodes, format="csr")[chosen])
        return csr_array(selection @ laplacian @ selection.T)

    def _gather_adjacency(self) -> coo_array:
        """W of the whole graph; nodes are numbered group after group."""
        parts = []
        first = 0
        for group in self.groups:
            edges = group.primary_edges(self._communicator.rank)
            if group.is_path:
                edges = edges.repeated(group.copies)
            parts.append(edges.shifted(first))
            first += sum(parameter.nodes for parameter in group.parameters)
        edges = Edges.concatenate(self._communicator.gather_objects(Edges.concatenate(parts)))
        shape = (self.num_nodes, self.num_nodes)
        return coo_array((edges.weight, (edges.source, edges.target)), shape=shape)


def _first_nodes(parameters: Sequence[ParameterNodes]) -> dict[str, int]:
    """Number of each parameter's first node, all numbered in order."""
    first = np.cumsum([0, *(parameter.nodes for parameter in parameters)])
    return {parameter.name: int(first[i]) for i, parameter in enumerate(parameters)}


def _in_model(
    parameters: Sequence[ParameterNodes], first_node: Mapping[str, int]
) -> npt.NDArray[np.int64]:
    """The number in the model of each node of some of its parameters; see `_first_nodes`."""
    return np.concatenate([first_node[p.name] + np.arange(p.nodes) for p in parameters])


def _path_group(
    parameters: Sequence[ParameterNodes], families: Sequence[EdgeFamily], layout: ShardLayout
) -> Group:
    """Parameters as single nodes; every rank knows all edges without communication."""
    bucket = Bucket.of([replace(parameter, kind="parameter") for parameter in parameters])
    owners = RowOwners.of(bucket, layout)
    parts = []
    for family in families:
        assert isinstance(family, Depth), "only paths come here"
        one_way = family.edges(bucket.parameters, bucket.first_node, np.arange(bucket.nodes))
        both = Edges.concatenate([one_way, one_way.reversed()])
        parts.append(Edges(both.source, both.target, family.weight * both.weight))
    edges = Edges.concatenate(parts).combined(np.add)
    degree = np.bincount(edges.source, edges.weight, bucket.nodes).astype(np.float64)
    return Group(tuple(parameters), bucket, edges, degree, owners, is_path=True)
