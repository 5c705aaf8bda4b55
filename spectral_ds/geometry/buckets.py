"""Buckets: sets of parameters of equal node width that no edge leaves.

The filter works on one bucket at a time, so that its scratch memory is that of the largest bucket.
Columns are filtered independently, so a bucket may also be a slice of columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from spectral_ds.geometry.rectangles import Rectangle, rectangles_of
from spectral_ds.graph import EdgeFamily, ParameterNodes, Ring, Similarity, nodes_touched
from spectral_ds.sharding import Fragment, FragmentsByParameter, ShardLayout


@dataclass(frozen=True)
class Bucket:
    """Parameters whose nodes are numbered together, parameter after parameter.

    An element's address is node · width + column.

    Attributes:
        low, high: the columns of the nodes' signals that belong to the bucket.
    """

    parameters: tuple[ParameterNodes, ...]
    low: int
    high: int

    @classmethod
    def of(cls, parameters: Sequence[ParameterNodes]) -> "Bucket":
        """All columns of some parameters."""
        return cls(tuple(parameters), 0, parameters[0].width)

    @property
    def width(self) -> int:
        return self.high - self.low

    @cached_property
    def first_node(self) -> npt.NDArray[np.int64]:
        """Number of each parameter's first node, and the count of all; (parameters + 1,)."""
        return np.cumsum([0, *(parameter.nodes for parameter in self.parameters)])

    @property
    def nodes(self) -> int:
        return int(self.first_node[-1])

    @property
    def numel(self) -> int:
        return self.nodes * self.width

    @cached_property
    def _position(self) -> dict[str, int]:
        return {parameter.name: i for i, parameter in enumerate(self.parameters)}

    def rectangles(self, held: FragmentsByParameter) -> list[Rectangle]:
        """The parts of a rank's fragments that lie in the bucket, in the fragments' order."""
        own = [each for parameter in self.parameters for each in held.get(parameter.name, ())]
        own.sort(key=lambda numbered: numbered[0])
        return [part for index, fragment in own for part in self._parts(index, fragment)]

    def rectangles_of_ranks(self, layout: ShardLayout) -> list[list[Rectangle]]:
        """The parts of every rank's fragments that lie in the bucket, by rank."""
        found: list[list[Rectangle]] = [[] for _ in layout.fragments]
        for parameter in self.parameters:
            for rank, index, fragment in layout.holdings.get(parameter.name, ()):
                found[rank].extend(self._parts(index, fragment))
        return found

    def _parts(self, index: int, fragment: Fragment) -> Iterator[Rectangle]:
        position = self._position.get(fragment.parameter)
        if position is not None:
            parameter, first = self.parameters[position], int(self.first_node[position])
            for whole in rectangles_of(parameter, first, fragment, index):
                part = whole.clipped(self.low, self.high)
                if part is not None:
                    yield part

    def touched(self, layout: ShardLayout) -> npt.NDArray[np.int64]:
        """How many nodes each rank holds a part of; (world size,)."""
        found = np.zeros(layout.world_size, np.int64)
        for p in self.parameters:
            held = layout.holdings.get(p.name, ())
            runs = [(rank, part.start, part.end) for rank, _, part in held if part.length]
            rank, start, end = np.array(runs, np.int64).reshape(-1, 3).T
            touched = nodes_touched(start, end, p.nodes_of_matrix, p.width, p.is_transposed)
            np.add.at(found, rank, touched)
        return found

    def slices(self, columns: int) -> list["Bucket"]:
        """The bucket cut into slices of so many columns."""
        return [
            replace(self, low=low, high=min(low + columns, self.high))
            for low in range(self.low, self.high, columns)
        ]


# How many elements of one rank travel together at most, see `Shipment`. On CPUs eight buckets took
# 1.4 times as long one by one (a filter of 134 M elements on 2 ranks); of accelerators' larger
# buckets only small ones travel together.
SHIPMENT_ELEMENTS = 2**22


def bucket_elements(device: torch.device) -> int:
    """How many elements of a bucket a rank stores at most.

    On CPUs a bucket should stay in the cache (measured on 53 M elements: 1.9 times faster);
    accelerators want fewer and larger launches.
    """
    return 2**19 if device.type == "cpu" else 2**26


def below_shard(most: int, elements: int, world_size: int) -> int:
    """At most so many elements of a bucket that scratch memory takes about the mean shard, or less.

    Scratch memory is three matrices of a bucket, and two buffers of what is exchanged. Shards below
    5 · 2**24 elements (a third of a gigabyte) may take more: smaller buckets would cost more
    collectives than memory.

    Args:
        most: from `bucket_elements`.
        elements: of all ranks together.
    """
    return min(most, max(2**24, elements // world_size // 5))


def columns_at_once(bucket_elements: int, nodes: int) -> int:
    """Columns of a slice of which a rank that holds so many nodes holds at most so many elements.

    A multiple of 16, and at least that.
    """
    return max(16, bucket_elements // max(nodes, 1) // 16 * 16)


def linked_parameters(
    parameters: Sequence[ParameterNodes], families: Sequence[EdgeFamily]
) -> list[tuple[ParameterNodes, ...]]:
    """Groups of parameters that edges may join, in model order.

    Args:
        families: the edge families; their `links` say which parameters they join.
    """
    links = [pair for family in families for pair in family.links(parameters)]
    ends = np.array(links, np.int64).reshape(-1, 2)
    count = len(parameters)
    adjacency = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(count, count))
    groups, label = connected_components(adjacency, directed=False)
    members: list[list[ParameterNodes]] = [[] for _ in range(groups)]
    for parameter, group in zip(parameters, label, strict=True):
        members[group].append(parameter)
    return [tuple(joined) for joined in members]


def parameters_with_edges(
    parameters: Sequence[ParameterNodes], families: Sequence[EdgeFamily]
) -> list[ParameterNodes]:
    """The parameters of which edges may reach a node, in model order.

    All that others have is frequency 0: in a spectrum, they would count as smooth on any graph.
    """
    is_inside = any(isinstance(family, Ring | Similarity) for family in families)
    alone = {
        group[0].name
        for group in linked_parameters(parameters, families)
        if len(group) == 1 and not (is_inside and group[0].nodes_of_matrix > 1)
    }
    return [parameter for parameter in parameters if parameter.name not in alone]
