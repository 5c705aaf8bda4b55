"""Rectangles: parts of fragments in the coordinates of a graph, (node, column of its signal).

In: a run of a flattened parameter. Out: at most three rectangles, whatever a node is; a shard
boundary may cut the run's first and last matrix row. (Of stacked matrices whose columns are nodes,
so many for each.)
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from spectral_ds.graph import ParameterNodes
from spectral_ds.sharding import Fragment, intervals


@dataclass(frozen=True)
class Rectangle:
    """nodes × columns elements of one fragment.

    Attributes:
        fragment: which of a rank's fragments.
        offset: of the first element in the fragment.
        node, column: coordinates of the first element.
        nodes, columns: extent.
        node_step, column_step: how far apart neighbours lie in the fragment.
    """

    fragment: int
    offset: int
    node: int
    column: int
    nodes: int
    columns: int
    node_step: int
    column_step: int

    @property
    def numel(self) -> int:
        return self.nodes * self.columns

    def view(self, fragment: torch.Tensor) -> torch.Tensor:
        """The elements, as a (nodes, columns) view of the flat fragment."""
        return fragment.as_strided(
            (self.nodes, self.columns),
            (self.node_step, self.column_step),
            fragment.storage_offset() + self.offset,
        )

    def clipped(self, low: int, high: int) -> "Rectangle | None":
        """The rectangle's columns [low, high), renumbered from 0; None if there are none."""
        first = max(self.column, low)
        count = min(self.column + self.columns, high) - first
        if count <= 0:
            return None
        offset = self.offset + (first - self.column) * self.column_step
        return replace(self, offset=offset, column=first - low, columns=count)


def rectangles_of(
    parameter: ParameterNodes, first_node: int, fragment: Fragment, index: int
) -> list[Rectangle]:
    """The rectangles of one fragment.

    Args:
        first_node: number of the parameter's first node.
        index: the fragment's number among those of its rank.
    """
    start, length = fragment.start, fragment.length
    if length == 0:
        return []
    if parameter.kind == "parameter":
        return [Rectangle(index, 0, first_node, start, 1, length, parameter.numel, 1)]
    if parameter.kind == "element":
        return [Rectangle(index, 0, first_node + start, 0, length, 1, 1, 1)]
    width, end = parameter.columns, start + length
    cuts = {start, -(-start // width) * width, end // width * width, end}
    if parameter.is_transposed:  # nodes of each matrix are others
        matrix = parameter.numel // parameter.matrices
        cuts |= set(range(-(-start // matrix) * matrix, end, matrix))
    ends = sorted(cut for cut in cuts if start <= cut <= end)
    found = []
    for first, last in pairwise(ends):
        row, column = divmod(first, width)
        rows = max(1, (last - first) // width)
        columns = min(width, last - first)
        offset = first - start
        if parameter.is_transposed:
            number, row = divmod(row, parameter.width)
            node = first_node + number * width + column
            found.append(Rectangle(index, offset, node, row, columns, rows, 1, width))
        else:
            found.append(
                Rectangle(index, offset, first_node + row, column, rows, columns, width, 1)
            )
    return found


def addresses(rectangles: Iterable[Rectangle], width: int) -> intervals.Intervals:
    """The addresses node · width + column that rectangles cover."""
    runs = [np.zeros((0, 2), np.int64)]
    for part in rectangles:
        if part.columns == width:
            runs.append(np.array([[part.node, part.node + part.nodes]], np.int64) * width)
        else:
            first = np.arange(part.node, part.node + part.nodes) * width + part.column
            runs.append(np.stack((first, first + part.columns), axis=1))
    return intervals.merge(np.concatenate(runs))
