"""The lowest eigenpairs of L, sharded like its rows.

LOBPCG (Knyazev 2001) in float64, with a Chebyshev polynomial of L (Zhou 2006) for a preconditioner:
block iterations that need only products with L, one exchange each, and small Gram matrices summed
over ranks. Depth paths, rings and small groups are solved exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.graph import Edges
from spectral_ds.laplacian import Group, ParameterGraph, plan_on_node_signals
from spectral_ds.laplacian.operator import laplacian_rows
from spectral_ds.sharding import Communicator
from spectral_ds.spectrum.rings import ring_eigenpairs, ring_weight

# Largest ‖L u − λ u‖, relative to half of λ_max where that is below 1.
RESIDUAL = 1e-6
MAX_ITERATIONS = 1000
# Vectors beyond the k asked for, so that the k-th converges as fast as the others.
GUARD = 8
# Below this many nodes, a dense eigendecomposition on every rank.
DENSE_NODES = 1024
# Directions shorter than this, relative to the longest, are dropped as dependent.
DEPENDENT = 1e-12
# Degree of the Chebyshev polynomial that damps high frequencies in the search space.
SMOOTHING_DEGREE = 8


@dataclass(frozen=True)
class Eigenpairs:
    """Lowest eigenpairs of the components that one group of joined parameters makes.

    Attributes:
        parameters: their names.
        copies: how many equal graphs the group consists of: for depth paths, one for each node of
            a parameter, else 1.
        values: (k,), float64, ascending.
        rows: (n,): the nodes that this rank answers for, numbered parameter after parameter; of
            depth paths: the parameters.
        vectors: (n, k), float64: the eigenvectors' entries there; orthonormal over all ranks.
        residuals: (k,): ‖L u − λ u‖.
    """

    parameters: tuple[str, ...]
    copies: int
    values: npt.NDArray[np.float64]
    rows: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.float64]
    residuals: npt.NDArray[np.float64]


class NotConvergedError(RuntimeError):
    """An eigensolver did not reach its residual."""


def lowest_eigenpairs(
    graph: ParameterGraph,
    count: int,
    communicator: Communicator,
    *,
    seed: int,
    dense_nodes: int = DENSE_NODES,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Eigenpairs]:
    """The `count` lowest eigenpairs of every group, or all of a smaller one (collective).

    Args:
        communicator: the ranks that share the parameters.
        seed: of the first guess, which is equal at every world size.
        dense_nodes: groups of so many nodes or fewer are solved by a dense eigendecomposition.
        progress: called with the number of groups done since the last call.

    Raises:
        NotConvergedError: a residual is above 1e-6 (times λ_max/2, if that is below 1) after 1,000
            iterations; on all ranks.
    """
    found = []
    for group in graph.groups:
        if group.is_path or group.bucket.nodes <= max(dense_nodes, 3 * (count + GUARD)):
            found.append(_dense(graph, group, count, communicator))
        elif (weight := ring_weight(group, communicator)) is not None:
            found.append(_ring(graph, group, weight, count, communicator))
        else:
            found.append(_lobpcg(graph, group, count, communicator, seed))
        progress(1)
    return found


def _dense(
    graph: ParameterGraph, group: Group, count: int, communicator: Communicator
) -> Eigenpairs:
    laplacian = dense_laplacian(graph, group, communicator)
    values, vectors = np.linalg.eigh(laplacian)
    values, vectors = values[:count], vectors[:, :count]
    residuals = np.linalg.norm(laplacian @ vectors - vectors * values, axis=0)
    rows = group.primary_rows(communicator.rank)
    names = tuple(parameter.name for parameter in group.parameters)
    return Eigenpairs(names, group.copies, values, rows, vectors[rows], residuals)


def _ring(
    graph: ParameterGraph, group: Group, weight: float, count: int, communicator: Communicator
) -> Eigenpairs:
    values, vectors, residuals = ring_eigenpairs(
        group, weight, count, graph.normalized, communicator
    )
    rows = group.primary_rows(communicator.rank)
    return Eigenpairs((group.parameters[0].name,), 1, values, rows, vectors, residuals)


class _ShardedLaplacian:
    """X → L X for (own rows, columns) float64 matrices of one group.

    Args:
        columns: the most that X may have.
    """

    def __init__(
        self, graph: ParameterGraph, group: Group, columns: int, communicator: Communicator
    ) -> None:
        part = graph.of_groups([group])
        layout = part.primary_layout(columns, communicator.world_size)
        plan = plan_on_node_signals(
            part,
            {parameter.name: columns for parameter in group.parameters},
            layout,
            communicator,
            communicator,
            bucket_elements=2**62,
            dtype=torch.float64,
        )
        (self._operator,) = plan.operators
        self._half = graph.lambda_max / 2

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        return self._operator.block.own_rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        own, columns = x.shape
        signal, product, _ = self._operator.scratch
        if own == 0:  # nothing is stored, not even columns; others may wait in the exchange
            self._operator.apply(signal, product)
            return x
        signal.values[:own, :columns] = x
        self._operator.apply(signal, product)
        return self._half * (product.values[:own, :columns] + x)


def _lobpcg(
    graph: ParameterGraph, group: Group, count: int, communicator: Communicator, seed: int
) -> Eigenpairs:
    block = count + GUARD
    laplacian = _ShardedLaplacian(graph, group, block, communicator)
    rows = laplacian.rows
    generator = torch.Generator().manual_seed(seed)
    guess = torch.randn(
        group.bucket.nodes, block, dtype=torch.float64, device="cpu", generator=generator
    )
    device = communicator.device
    space = guess[torch.from_numpy(rows)].to(device)

    def gram(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return communicator.sum_(a.T @ b)

    def rotated(basis: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues and vectors of L within an orthonormal basis (Rayleigh-Ritz)."""
        projected = gram(basis, image)
        values, turn = torch.linalg.eigh((projected + projected.T) / 2)
        return values, turn

    enough = RESIDUAL * min(1.0, graph.lambda_max / 2)
    space = _orthonormal([space], gram)
    x, direction, residual = space, space[:, :0], space.new_ones(count)
    for _ in range(MAX_ITERATIONS):
        basis = x
        image = laplacian(x)
        values, turn = rotated(basis, image)
        x, image = basis @ turn, image @ turn
        defect = image - x * values
        residual = communicator.sum_(defect.square().sum(dim=0)).sqrt()[:count]
        if float(residual.max()) <= enough:
            break
        smooth = _smoothed(laplacian, x, float(values[-1]), graph.lambda_max)
        basis = _orthonormal([x, smooth - x @ gram(x, smooth), direction], gram)
        image = torch.cat([laplacian(part) for part in basis.split(block, dim=1)], dim=1)
        _, turn = rotated(basis, image)
        new = basis @ turn[:, :block]
        direction = new - x @ gram(x, new)
        x = new
    else:
        raise NotConvergedError(
            f"eigenpairs of {group.parameters[0].name!r} and the parameters joined to it: residual "
            f"{float(residual.max()):.1e} > {enough:g} after {MAX_ITERATIONS} iterations"
        )
    return Eigenpairs(
        tuple(parameter.name for parameter in group.parameters),
        1,
        values[:count].cpu().numpy(),
        rows,
        x[:, :count].cpu().numpy(),
        residual.cpu().numpy(),
    )


def _orthonormal(
    parts: list[torch.Tensor], gram: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """An orthonormal basis of the columns; dependent ones are dropped (SVQB, Stathopoulos 2002)."""
    basis = torch.cat(parts, dim=1)
    for _ in range(3):
        product = gram(basis, basis)
        length = product.diagonal().sqrt().clamp_min(torch.finfo(product.dtype).tiny)
        values, vectors = torch.linalg.eigh(product / length / length[:, None])
        kept = values > DEPENDENT * values[-1]
        basis = (basis / length) @ (vectors[:, kept] / values[kept].sqrt())
    return basis


def _smoothed(
    laplacian: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    wanted: float,
    lambda_max: float,
) -> torch.Tensor:
    """A Chebyshev polynomial of L that is small beyond the wanted eigenvalues (Zhou 2006)."""
    low = min(max(1.5 * wanted, 0.05 * lambda_max), 0.9 * lambda_max)
    center, radius = (lambda_max + low) / 2, (lambda_max - low) / 2
    before, now = x, (laplacian(x) - center * x) / radius
    for _ in range(SMOOTHING_DEGREE - 1):
        before, now = now, 2 / radius * (laplacian(now) - center * now) - before
    return now


def dense_laplacian(
    graph: ParameterGraph, group: Group, communicator: Communicator
) -> npt.NDArray[np.float64]:
    """L of one group on every rank (collective); of depth paths, one of the equal ones."""
    edges = group.edges
    if not group.is_path:
        edges = Edges.concatenate(
            communicator.gather_objects(group.primary_edges(communicator.rank))
        )
    rows = np.arange(group.bucket.nodes)
    return laplacian_rows(edges, group.degree, rows, graph.normalized).toarray()
