"""Buckets: sets of parameters of equal node width that no edge leaves.

The filter works on one bucket at a time, so that its scratch memory is that of the largest
bucket. Buckets are equal on all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from spectral_ds.graph import EdgeFamily, ParameterNodes
from spectral_ds.sharding import Fragment, intervals


@dataclass(frozen=True)
class Bucket:
    """Parameters whose nodes are numbered together, row after row, parameter after parameter.

    An element's address is node · width + column: the parameters laid end to end.
    """

    parameters: tuple[ParameterNodes, ...]

    @property
    def width(self) -> int:
        return self.parameters[0].width

    @cached_property
    def first_node(self) -> npt.NDArray[np.int64]:
        """Number of each parameter's first node, and the count of all; (parameters + 1,)."""
        return np.cumsum([0, *(parameter.rows for parameter in self.parameters)])

    @property
    def nodes(self) -> int:
        return int(self.first_node[-1])

    @cached_property
    def _position(self) -> dict[str, int]:
        return {parameter.name: i for i, parameter in enumerate(self.parameters)}

    def address(self, fragment: Fragment) -> int | None:
        """Address of a fragment's first element; None if its parameter is not in the bucket."""
        position = self._position.get(fragment.parameter)
        if position is None:
            return None
        return int(self.first_node[position]) * self.width + fragment.start

    def owned(self, fragments: Sequence[Fragment]) -> intervals.Intervals:
        """The addresses that these fragments cover."""
        runs = [
            (address, address + fragment.length)
            for fragment in fragments
            if (address := self.address(fragment)) is not None
        ]
        return intervals.merge(np.array(runs, np.int64).reshape(-1, 2))


def make_buckets(
    parameters: Sequence[ParameterNodes], families: Sequence[EdgeFamily], max_elements: int
) -> list[Bucket]:
    """Group parameters that edges may join; pack small groups of equal width together.

    Args:
        parameters: in model order.
        families: the edge families; their `links` say which parameters they join.
        max_elements: a bucket is not filled beyond this many elements (over all ranks); a group
            that is larger by itself is a bucket of its own.
    """
    links = [pair for family in families for pair in family.links(parameters)]
    ends = np.array(links, np.int64).reshape(-1, 2)
    count = len(parameters)
    adjacency = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(count, count))
    groups, label = connected_components(adjacency, directed=False)
    members: list[list[ParameterNodes]] = [[] for _ in range(groups)]
    for parameter, group in zip(parameters, label, strict=True):
        members[group].append(parameter)

    buckets: list[Bucket] = []
    open_buckets: dict[int, list[ParameterNodes]] = {}
    for joined in members:
        width = joined[0].width
        held = open_buckets.setdefault(width, [])
        if held and sum(p.numel for p in [*held, *joined]) > max_elements:
            buckets.append(Bucket(tuple(held)))
            held = open_buckets[width] = []
        held += joined
    return buckets + [Bucket(tuple(held)) for held in open_buckets.values()]
