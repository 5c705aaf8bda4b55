"""The boundary of similarity edges, which depend on the weights: what to expect by chance.

All pairs of nodes of a scope are taken to be similar independently of each other. Each node is
joined to its k nearest and to those whose k nearest it is among. What is near from one end mostly
is from the other: for k = 8, four in five edges are mutual, and a node has 9.6.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import betaincc, betaincinv, gammaln
from scipy.stats import poisson

from spectral_ds.graph import Similarity
from spectral_ds.planning.flows import Cluster, Floats, Flow
from spectral_ds.planning.layouts import Ints
from spectral_ds.planning.parts import Parts
from spectral_ds.planning.structure import Boundary

# Tables of ranks by columns are worked through in pieces of this many numbers.
TABLE_ELEMENTS = 2**22
# Distances are averaged over so many equally likely values.
QUANTILES = 64
# It is worked out for so many numbers of nodes, and interpolated.
GRID = 2048
# exp(-1/2), the weight of an edge of mean length.
USUAL_WEIGHT = 0.61


@dataclass(frozen=True)
class Chance:
    """What to expect of one scope.

    Attributes:
        boundary: of its nodes.
        share: of what other ranks own in it, the part that each rank needs; (world size,).
        edges: undirected: expected, and the least and the most possible.
        degree: edges of a node, expected.
    """

    boundary: Boundary
    share: Floats
    edges: tuple[float, float, float]
    degree: float


def reached(rows: Ints, nodes: int, neighbours: int) -> Floats:
    """How likely a node has an edge to one of some others.

    Let v be the share of pairs that are more similar than a given one. A node's k-th nearest has
    v ~ Beta(k, nodes − k), and a pair with a given v is among the k nearest of its other end with
    probability 1 − I_v(k, nodes − 1 − k).

    Args:
        rows: how many others.
        nodes: of the scope.
        neighbours: k < nodes.
    """
    k, others = neighbours, nodes - 1
    if k >= others:
        return (rows > 0).astype(np.float64)
    # None of the others is among the k nearest: a ratio of binomial coefficients.
    rest = others - np.minimum(rows, others)
    all_far = gammaln(rest + 1) - gammaln(np.maximum(rest - k + 1, 0))
    apart = np.exp(all_far - gammaln(others + 1) + gammaln(others - k + 1))
    # Nor is the node among theirs, given how far its own k-th nearest is.
    quantile = (np.arange(QUANTILES) + 0.5) / QUANTILES
    far = betaincinv(k, nodes - k, quantile)
    beyond = k / others * betaincc(k + 1, others - k, far) - far * betaincc(k, others - k, far)
    unseen = np.log1p(-beyond / (1 - far))
    none: Floats = apart * np.exp(rows[:, None] * unseen).mean(axis=1)
    return 1 - none


def expected(parts: Parts, family: Similarity, cluster: Cluster) -> Chance:
    """What to expect of the nodes of one scope."""
    nodes, k = parts.all_nodes, min(family.neighbours, parts.all_nodes - 1)
    most = float(min(nodes * k, nodes * (nodes - 1) // 2))
    degree = float((nodes - 1) * reached(np.ones(1, np.int64), nodes, k)[0]) if k > 0 else 0.0
    edges = (nodes * degree / 2, nodes * k / 2, most)
    hop = _hop(parts, k, cluster) if k > 0 and len(np.unique(parts.rank)) > 1 else None
    if hop is None:
        none = Boundary.none(cluster)
        return Chance(none, np.zeros(cluster.world_size), edges, degree)
    away = parts.numel - parts.elements(cluster)
    touched = cluster.by_rank(parts.rank, parts.touched).clip(max=nodes)
    rows = reached(touched.astype(np.int64), nodes, k) * (nodes - touched)
    if parts.by_column.any():
        rows = np.minimum(rows, hop.received)
    return Chance(Boundary(hop, rows), hop.received / np.maximum(away, 1), edges, degree)


def _hop(parts: Parts, neighbours: int, cluster: Cluster) -> Flow:
    """What travels before one product: column by column, of which columns many are alike."""
    parts, times = _distinct(parts)
    turns = [
        np.where(parts.by_column, by_column, at % parts.width)
        for at in (parts.start, parts.end)
        for by_column in (at // parts.nodes, -(-at // parts.nodes))
    ]
    bounds = np.unique(np.concatenate([*turns, [0, parts.width]]))
    first = np.flatnonzero(np.diff(parts.rank, prepend=-1))
    ranks = parts.rank[first]
    machine = cluster.machine(ranks)
    of_machine = np.flatnonzero(np.diff(machine, prepend=-1))
    mine = np.searchsorted(machine[of_machine], machine)
    # By column alike: how many nodes each rank owns there, and how likely it needs another.
    found = np.zeros((4, len(ranks)))
    largest = int(cluster.by_rank(parts.rank, parts.touched * times).max())
    grid = np.unique(np.geomspace(1, largest + 1, GRID).astype(np.int64) - 1)
    chance = reached(grid, parts.all_nodes, neighbours)
    piece = max(1, TABLE_ELEMENTS // len(parts.rank))
    for low in range(0, len(bounds) - 1, piece):
        column = bounds[low : low + piece + 1]
        length = np.diff(column)
        start, end = parts.start[:, None], parts.end[:, None]
        nodes, by_column = parts.nodes[:, None], parts.by_column[:, None]
        column = column[:-1]
        own = parts.before(end, nodes, by_column, column, column + 1)
        own = own - parts.before(start, nodes, by_column, column, column + 1)
        own = own * times[:, None]
        own = np.add.reduceat(own, first, axis=0)
        needs = np.interp(own, grid, chance)
        near = np.add.reduceat(own, of_machine)[mine] - own
        others = np.add.reduceat(needs, of_machine)[mine] - needs
        found += np.stack(
            (
                (own * (needs.sum(axis=0) - needs)) @ length,
                (needs * (parts.all_nodes - own)) @ length,
                (own * others) @ length,
                (needs * near) @ length,
            )
        )
    return Flow(*(cluster.by_rank(ranks, each) for each in found))


def _distinct(parts: Parts) -> tuple[Parts, Ints]:
    """Runs of one rank that cover the same columns, once, by rank; how often each is there."""
    first = np.where(parts.by_column, parts.start, parts.start % parts.width)
    ends = first, first + parts.length
    keys = np.stack((parts.rank, *ends, parts.nodes, parts.by_column), axis=1)
    keys, times = np.unique(keys, axis=0, return_counts=True)
    rank, start, end, nodes, by_column = keys.T
    parts = Parts(
        start,
        end,
        rank,
        np.zeros_like(rank),
        np.zeros_like(rank),
        nodes,
        by_column.astype(bool),
        parts.width,
        parts.all_nodes,
    )
    return parts, times


def most_neighbours(nodes: int, neighbours: int) -> float:
    """Edges of the node that is among most others' nearest, about."""
    return float(min(nodes - 1, neighbours / 4 + poisson.isf(1 / nodes, neighbours)))
