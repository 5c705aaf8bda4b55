"""Eigenvalues of one group of joined parameters: the lowest, the largest, and where all lie."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array, eye_array
from scipy.sparse.linalg import ArpackNoConvergence, eigsh

from spectral_ds.laplacian import Group, ParameterGraph
from spectral_ds.laplacian.operator import laplacian_rows
from spectral_ds.sharding import Communicator
from spectral_ds.spectrum import density_of_states, equal_edges

Values = npt.NDArray[np.float64]

# Up to so many nodes, a dense eigendecomposition gives all eigenvalues of a group.
DENSE_NODES = 1024
# Up to so many, sparse LU factors fit into memory whatever the graph.
FACTORIZED_NODES = 8192
# Restarts of Lanczos until another solver is tried.
MAX_RESTARTS = 100
# Eigenvalues closer than this share of λ_max count as one.
SAME = 1e-7


@dataclass(frozen=True)
class GroupSpectrum:
    """Eigenvalues of one group of joined parameters, with all its copies.

    Attributes:
        lowest: the lowest above 0, equal ones once; None if the solver has not converged.
        counts: (bins,): number of eigenvalues in each bin, all copies.
    """

    lowest: Values | None
    largest: float
    counts: Values


def laplacian_of(group: Group, normalized: bool) -> csr_array:
    """L of a group; of depth paths, one of the equal ones."""
    return laplacian_rows(
        group.edges, group.degree, np.arange(group.bucket.nodes), normalized
    ).tocsr()


def spectrum_of(
    graph: ParameterGraph,
    group: Group,
    label: npt.NDArray[np.int32],
    components: int,
    wanted: int,
    bins: int,
    seed: int,
) -> GroupSpectrum:
    """Exact for depth paths and small groups; else by Lanczos and random probes.

    Args:
        label: (nodes,): which component each node is in.
        components: their number, which is how often λ = 0.
        wanted: how many of the lowest eigenvalues above 0.
        bins: of the density of states.
        seed: of guesses and probes.
    """
    nodes, bound = group.bucket.nodes, graph.lambda_max
    laplacian = laplacian_of(group, graph.normalized)
    if group.is_path or nodes <= DENSE_NODES:
        values = torch.linalg.eigvalsh(torch.from_numpy(laplacian.toarray())).numpy()
        # Rounding must not carry an eigenvalue out of the spectrum or over an edge of a bin.
        values = np.clip(values.round(12), 0, bound)
        counts = np.histogram(values, equal_edges(bins) * bound)[0] * float(group.copies)
        lowest = distinct(values[components:], bound)[:wanted]
        return GroupSpectrum(lowest, float(values[-1]), counts)
    alone = graph.of_groups([group])
    communicator = Communicator.alone(torch.device("cpu"))
    density = density_of_states(alone, bins, communicator, seed=seed, dense_nodes=DENSE_NODES)
    ends = [
        _ends(csr_array(laplacian[rows][:, rows]), wanted, bound, seed)
        for rows in _members(label, components)
    ]
    largest = max((high for _, high in ends), default=0.0)
    found: Values | None = None
    if all(low is not None for low, _ in ends):
        merged = np.concatenate([np.zeros(0), *(low for low, _ in ends if low is not None)])
        found = distinct(np.sort(merged), bound)[:wanted]
    return GroupSpectrum(found, largest, density.share * nodes)


def _members(label: npt.NDArray[np.int32], components: int) -> list[npt.NDArray[np.int64]]:
    """The nodes of each component that has an edge."""
    order = np.argsort(label, kind="stable")
    sizes = np.bincount(label, minlength=components)
    return [rows for rows in np.split(order, np.cumsum(sizes)[:-1]) if len(rows) > 1]


def _ends(
    laplacian: csr_array, wanted: int, bound: float, seed: int
) -> tuple[Values | None, float]:
    """The lowest eigenvalues above 0 and the largest one of a connected component."""
    nodes = laplacian.shape[0]
    if nodes <= max(DENSE_NODES // 2, 8 * wanted):
        values = np.linalg.eigvalsh(laplacian.toarray())
        return values[1:], float(values[-1])
    count = 2 * wanted + 1  # 0 comes once; above it, some come twice (on a ring, say)
    guess = np.random.default_rng(seed).standard_normal(nodes)
    solve: Any = partial(eigsh, v0=guess, return_eigenvectors=False)
    largest = float(solve(laplacian, 1, which="LA", tol=1e-6)[0])
    try:
        # Relative to λ_max, not to 0: turned round, the lowest are the largest.
        turned = bound * csr_array(eye_array(nodes)) - laplacian
        found = solve(turned, count, which="LA", tol=1e-9, maxiter=MAX_RESTARTS)
        return np.sort(bound - found)[1:], largest
    except ArpackNoConvergence:
        if nodes > FACTORIZED_NODES:
            return None, largest
    shifted = solve(laplacian.tocsc(), count, sigma=-1e-3 * bound, tol=1e-9)
    return np.sort(shifted)[1:], largest


def distinct(values: Values, bound: float) -> Values:
    """Ascending values without those that are equal to the one before."""
    if len(values) == 0:
        return values
    kept = np.concatenate(([True], np.diff(values) > SAME * bound))
    return values[kept]
