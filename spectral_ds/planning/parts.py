"""Parts: who owns which part of a group of joined parameters, in the coordinates of their graph.

A flat element of a parameter has a node and a column of the node's signal. Everything here is
arithmetic on the ends of runs, so that its cost is that of the number of runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from spectral_ds.graph import ParameterNodes, nodes_touched
from spectral_ds.planning.flows import Cluster, Flow
from spectral_ds.planning.layouts import Cuts, Ints
from spectral_ds.sharding import intervals

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Parts:
    """Runs of flattened matrices, matrix after matrix, ranks ascending in each.

    A parameter is one matrix, or a stack of some.

    Attributes:
        start, end: (runs,): in the matrix.
        rank: (runs,).
        parameter: (runs,): position of each run's parameter.
        matrix: (runs,): number of each run's matrix, over all parameters.
        nodes: (runs,): how many nodes the matrix has.
        by_column: (runs,): whether these are the columns of the matrix as it is stored.
        width: columns of all nodes' signals.
        all_nodes: of all parameters.
    """

    start: Ints
    end: Ints
    rank: Ints
    parameter: Ints
    matrix: Ints
    nodes: Ints
    by_column: Bools
    width: int
    all_nodes: int

    @classmethod
    def of(cls, parameters: Sequence[ParameterNodes], cuts: Sequence[Cuts]) -> "Parts":
        """The runs of parameters of equal width."""
        stacks = [_matrices(p, cut) for p, cut in zip(parameters, cuts, strict=True)]
        start, end, rank, matrix = (np.concatenate(part) for part in zip(*stacks, strict=True))
        runs = [len(stack[0]) for stack in stacks]
        before = np.cumsum([0, *(parameter.matrices for parameter in parameters)])[:-1]
        return cls(
            start,
            end,
            rank,
            np.repeat(np.arange(len(cuts)), runs),
            matrix + np.repeat(before, runs),
            np.repeat([parameter.nodes_of_matrix for parameter in parameters], runs),
            np.repeat([parameter.is_transposed for parameter in parameters], runs),
            parameters[0].width,
            sum(parameter.nodes for parameter in parameters),
        )

    @property
    def numel(self) -> int:
        return self.all_nodes * self.width

    @cached_property
    def length(self) -> Ints:
        return self.end - self.start

    def elements(self, cluster: Cluster) -> Ints:
        """How many elements each rank owns."""
        return cluster.by_rank(self.rank, self.length).astype(np.int64)

    def before(
        self, at: Ints, nodes: Ints, by_column: Bools, low: Ints | int, high: Ints | int
    ) -> Ints:
        """How many elements of a matrix before `at` have a column in [low, high).

        Args:
            nodes, by_column: of the matrix; all arguments broadcast.
        """
        found = []
        if by_column.any():
            found.append(np.clip(at, low * nodes, high * nodes) - low * nodes)
        if not by_column.all():
            whole, rest = np.divmod(at, self.width)
            found.append(np.asarray(whole * (high - low) + np.clip(rest - low, 0, high - low)))
        return found[0] if len(found) == 1 else np.where(by_column, *found)

    def count(self, low: Ints | int, high: Ints | int) -> Ints:
        """How many elements of each run have a column in [low, high)."""
        last = self.before(self.end, self.nodes, self.by_column, low, high)
        return last - self.before(self.start, self.nodes, self.by_column, low, high)

    @cached_property
    def touched(self) -> Ints:
        """How many nodes each run holds a part of."""
        return nodes_touched(self.start, self.end, self.nodes, self.width, self.by_column)

    def columns(self, cluster: Cluster) -> Ints:
        """How many columns each rank owns a part of."""
        low = np.where(self.length >= self.width, 0, self.start % self.width)
        high = low + np.minimum(self.length, self.width)
        low = np.where(self.by_column, self.start // self.nodes, low)
        high = np.where(self.by_column, -(-self.end // self.nodes), high)
        wrapped = np.stack((np.zeros_like(low), (high - self.width).clip(0)), axis=1)
        runs = np.stack((low, high.clip(max=self.width)), axis=1)
        runs, rank = np.concatenate((runs, wrapped)), np.tile(self.rank, 2)
        # Ranks side by side, with a gap that keeps their runs apart.
        room = self.width + 1
        merged = intervals.merge(runs + (rank * room)[:, None])
        spans = merged[:, 1] - merged[:, 0]
        return cluster.by_rank(merged[:, 0] // room, spans).astype(np.int64)

    def transposed(self, slices: Ints, cluster: Cluster) -> Flow:
        """What goes where when each rank gets a slice of columns with every node.

        Args:
            slices: where each rank's begins, and the last ends; (world size + 1,).
        """
        size = cluster.ranks_per_machine
        machine = cluster.machine(self.rank)
        stays = cluster.by_rank(self.rank, self.count(slices[self.rank], slices[self.rank + 1]))
        inside = cluster.by_rank(self.rank, self.count(slices[0], slices[-1]))
        here = self.count(slices[machine * size], slices[(machine + 1) * size])
        received = self.all_nodes * np.diff(slices)
        # Of neighbouring runs on one machine, each of its ranks gets its slice.
        new = np.flatnonzero(np.diff(machine, prepend=-1) | np.diff(self.matrix, prepend=-1))
        last = np.append(new[1:], len(machine)) - 1
        rank = np.repeat(machine[new] * size, size) + np.tile(np.arange(size), len(new))
        first, last = np.repeat(new, size), np.repeat(last, size)
        columns = self.nodes[first], self.by_column[first], slices[rank], slices[rank + 1]
        comes = self.before(self.end[last], *columns) - self.before(self.start[first], *columns)
        return Flow(
            inside - stays,
            received - stays,
            cluster.by_rank(self.rank, here) - stays,
            cluster.by_rank(rank, comes) - stays,
        )

    def only(self, parameters: Sequence[int]) -> "Parts":
        """The runs of some of the parameters."""
        return self._kept(np.isin(self.parameter, parameters))

    def each_matrix(self) -> "list[Parts]":
        """The runs of each matrix."""
        return [self._kept(self.matrix == matrix) for matrix in np.unique(self.matrix)]

    def _kept(self, kept: Bools) -> "Parts":
        first = np.unique(self.matrix[kept], return_index=True)[1]
        nodes = self.nodes[kept]
        return Parts(
            self.start[kept],
            self.end[kept],
            self.rank[kept],
            self.parameter[kept],
            self.matrix[kept],
            nodes,
            self.by_column[kept],
            self.width,
            int(nodes[first].sum()),
        )


def _matrices(parameter: ParameterNodes, cut: Cuts) -> tuple[Ints, Ints, Ints, Ints]:
    """(start, end, rank, matrix) of a parameter's runs, cut where a matrix ends."""
    bounds, rank, size = cut.bounds, cut.rank, parameter.numel // parameter.matrices
    if parameter.matrices > 1:
        bounds = np.union1d(bounds, np.arange(0, parameter.numel, size))
        rank = cut.owner(bounds[:-1])
    matrix = bounds[:-1] // size
    return bounds[:-1] - matrix * size, bounds[1:] - matrix * size, rank, matrix


def joined(groups: Sequence[Parts]) -> Parts:
    """Groups of equal width as one."""

    def all_of(field: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(group, field) for group in groups])

    def numbered(field: str) -> Ints:
        numbers = [getattr(group, field) for group in groups]
        before = np.cumsum([0, *(int(number[-1]) + 1 for number in numbers)])[:-1]
        shifted = zip(numbers, before, strict=True)
        return np.concatenate([number + first for number, first in shifted])

    return Parts(
        all_of("start"),
        all_of("end"),
        all_of("rank"),
        numbered("parameter"),
        numbered("matrix"),
        all_of("nodes"),
        all_of("by_column"),
        groups[0].width,
        sum(group.all_nodes for group in groups),
    )
