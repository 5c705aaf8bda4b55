"""The boundary of edges that follow from names and shapes: exact, for all ranks at once.

Seen flat, the neighbours of a run of elements are a run of the same length elsewhere. Between the
places where owners change, on either side, all elements have one owner and their neighbours one
each: counting those stretches counts the elements.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spectral_ds.graph import Depth, EdgeFamily, Pair, ParameterNodes, Ring
from spectral_ds.planning.flows import Cluster, Floats, Flow
from spectral_ds.planning.layouts import Cuts, Ints
from spectral_ds.sharding import intervals


@dataclass(frozen=True)
class Shift:
    """Elements [start, end) of one parameter have neighbours `offset` further in another.

    Attributes:
        other: position of the other parameter.
        start, end, offset: (runs,); ascending, disjoint.
    """

    other: int
    start: Ints
    end: Ints
    offset: Ints

    @classmethod
    def whole(cls, other: int, size: int) -> "Shift":
        return cls(other, np.array([0]), np.array([size]), np.array([0]))

    def turns(self, cuts: Cuts) -> Ints:
        """The elements at which the neighbours' owner may change."""
        low = np.searchsorted(cuts.bounds, self.start + self.offset, side="right")
        high = np.searchsorted(cuts.bounds, self.end + self.offset, side="left")
        bound = intervals.members(np.stack((low, high), axis=1))
        inside = cuts.bounds[bound] - np.repeat(self.offset, high - low)
        return np.concatenate((self.start, self.end, inside))

    def owner(self, elements: Ints, cuts: Cuts) -> Ints:
        """Who owns the neighbour of each element; -1 where it has none."""
        at = np.searchsorted(self.start, elements, side="right") - 1
        inside = (at >= 0) & (elements < self.end[at])
        return np.where(inside, cuts.owner(elements + self.offset[at] * inside), -1)


def shifts(
    parameters: Sequence[ParameterNodes], families: Sequence[EdgeFamily], cuts: Sequence[Cuts]
) -> list[list[Shift]]:
    """The neighbours of each parameter's elements; of rings by column, only where rows are cut."""
    found: list[list[Shift]] = [[] for _ in parameters]
    for family in families:
        if isinstance(family, Ring):
            for position, parameter in enumerate(parameters):
                found[position] += _ring(position, parameter, cuts[position])
        elif isinstance(family, Depth | Pair):
            for a, b in family.links(parameters):
                if parameters[a].shape == parameters[b].shape:
                    found[a].append(Shift.whole(b, parameters[b].numel))
                    found[b].append(Shift.whole(a, parameters[a].numel))
                else:
                    assert isinstance(family, Pair), "depth joins equal shapes"
                    found[a].append(_key_of(family, parameters[a], parameters[b], b))
                    found[b] += _queries_of(family, parameters[a], parameters[b], a)
    return found


def _ring(position: int, parameter: ParameterNodes, cuts: Cuts) -> list[Shift]:
    nodes = parameter.nodes_of_matrix
    if nodes == 1:
        return []
    if parameter.is_transposed:
        # A matrix row with one owner needs nothing.
        first = np.unique(cuts.bounds[cuts.bounds % nodes > 0] // nodes) * nodes
        if len(first) == 0:
            return []
        last, step, around = first + nodes, 1, nodes - 1
    else:
        size = parameter.numel // parameter.matrices
        first = np.arange(parameter.matrices) * size
        last, step, around = first + size, parameter.width, size - parameter.width
    step_on = np.tile([step, -around], len(first))
    step_back = np.tile([around, -step], len(first))
    forward = np.stack((first, last - step, last - step, last), axis=1).reshape(-1, 2)
    backward = np.stack((first, first + step, first + step, last), axis=1).reshape(-1, 2)
    return [
        Shift(position, forward[:, 0], forward[:, 1], step_on),
        Shift(position, backward[:, 0], backward[:, 1], step_back),
    ]


def _key_of(family: Pair, query: ParameterNodes, key: ParameterNodes, position: int) -> Shift:
    """Grouped queries: the key's head for each head of the query."""
    assert family.head_width is not None, "checked by links"
    head = family.head_width * query.columns
    number = np.arange(query.numel // head)
    group = number // (query.rows // key.rows)
    return Shift(position, number * head, (number + 1) * head, (group - number) * head)


def _queries_of(
    family: Pair, query: ParameterNodes, key: ParameterNodes, position: int
) -> list[Shift]:
    """The first, second, ... query head for each head of the key."""
    assert family.head_width is not None, "checked by links"
    head, heads = family.head_width * query.columns, query.rows // key.rows
    number = np.arange(key.numel // head)
    return [
        Shift(
            position,
            number * head,
            (number + 1) * head,
            (number * (heads - 1) + which) * head,
        )
        for which in range(heads)
    ]


def node_degrees(
    parameters: Sequence[ParameterNodes], families: Sequence[EdgeFamily]
) -> tuple[Floats, Floats]:
    """Edges of each parameter's nodes, and the sum of their weights; without similarity."""
    count = np.zeros(len(parameters))
    weight = np.zeros(len(parameters))
    for family in families:
        here: dict[int, float] = defaultdict(float)
        if isinstance(family, Ring):
            here |= {i: min(2.0, p.nodes_of_matrix - 1) for i, p in enumerate(parameters)}
        elif isinstance(family, Depth | Pair):
            for a, b in family.links(parameters):
                here[a] += 1
                here[b] += parameters[a].numel // parameters[b].numel
        for position, edges in here.items():
            count[position] += edges
            weight[position] += edges * family.weight
    return count, weight


@dataclass(frozen=True)
class Boundary:
    """What ranks need of each other's nodes.

    Attributes:
        hop: elements that travel before one product with L.
        rows: nodes of other ranks that each rank stores for it; (world size,).
    """

    hop: Flow
    rows: Floats

    @classmethod
    def none(cls, cluster: Cluster) -> "Boundary":
        return cls(Flow.none(cluster), np.zeros(cluster.world_size))

    def __add__(self, other: "Boundary") -> "Boundary":
        return Boundary(self.hop + other.hop, self.rows + other.rows)


def known_boundary(
    parameters: Sequence[ParameterNodes],
    cuts: Sequence[Cuts],
    neighbours: Sequence[Sequence[Shift]],
    cluster: Cluster,
    share: Floats,
) -> Boundary:
    """The boundary of edges by `shifts`.

    Args:
        share: of what each rank needs by these edges, what it does not have by others.
    """
    total = Boundary.none(cluster)
    for parameter, cut, its in zip(parameters, cuts, neighbours, strict=True):
        concerned = [cut, *(cuts[shift.other] for shift in its)]
        if not its or len({int(r) for each in concerned for r in each.rank[[0, -1]]}) == 1:
            continue  # no edges, or one rank owns all
        turns = np.unique(np.concatenate([cut.bounds, *(s.turns(cuts[s.other]) for s in its)]))
        start, end = turns[:-1], turns[1:]
        source = cut.owner(start)
        owner = np.sort(np.stack([s.owner(start, cuts[s.other]) for s in its]), axis=0)
        is_new = np.diff(owner, axis=0, prepend=-1) != 0
        which, at = np.nonzero(is_new & (owner >= 0) & (owner != source))
        target = owner[which, at]
        elements = (end - start)[at] * share[target]
        rows = np.zeros(cluster.world_size)
        if not parameter.is_transposed:
            rows = _new_rows(parameter.width, cut, start[at], end[at], target, cluster)
        total += Boundary(Flow.of_pairs(source[at], target, elements, cluster), rows * share)
    return total


def _new_rows(
    width: int, cut: Cuts, start: Ints, end: Ints, target: Ints, cluster: Cluster
) -> Floats:
    """How many rows of a parameter each rank needs a part of, and owns nothing of."""
    order = np.lexsort((start, target))
    target, first, last = target[order], start[order] // width, (end[order] - 1) // width
    # The rows that the rank owns a part of itself: from `low` to `high`.
    low, high = np.full(cluster.world_size, -1), np.full(cluster.world_size, -2)
    low[cut.rank], high[cut.rank] = cut.bounds[:-1] // width, (cut.bounds[1:] - 1) // width
    is_before = last <= low[target]
    last = last - (is_before & (last == low[target]))
    first = first + (~is_before & (first == high[target]))
    kept = last >= first
    target, first, last = target[kept], first[kept], last[kept]
    # A row that two stretches share is one row.
    shared = (target[1:] == target[:-1]) & (first[1:] == last[:-1])
    return cluster.by_rank(target, last - first + 1) - cluster.by_rank(target[1:], shared)
