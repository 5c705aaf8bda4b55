"""Parts: who owns which part of a group of joined parameters, in the coordinates of their graph.

A flat element of a parameter has a node and a column of the node's signal. Everything here is
arithmetic on the ends of runs, so that its cost is that of the number of runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from spectral_ds.graph import ParameterNodes, nodes_touched
from spectral_ds.planning.flows import Cluster, Flow
from spectral_ds.planning.layouts import Cuts, Ints
from spectral_ds.sharding import intervals


@dataclass(frozen=True, eq=False)
class Parts:
    """Runs of flattened parameters, parameter after parameter, ranks ascending in each.

    Attributes:
        start, end, rank: (runs,).
        parameter: (runs,): position of each run's parameter.
        nodes: (runs,): how many nodes it has.
        width: columns of all nodes' signals.
        by_column: whether nodes are columns of the parameters' matrices.
        all_nodes: of all parameters.
    """

    start: Ints
    end: Ints
    rank: Ints
    parameter: Ints
    nodes: Ints
    width: int
    by_column: bool
    all_nodes: int

    @classmethod
    def of(cls, parameters: Sequence[ParameterNodes], cuts: Sequence[Cuts]) -> "Parts":
        """The runs of parameters of equal width."""
        runs = [len(cut.rank) for cut in cuts]
        return cls(
            np.concatenate([cut.bounds[:-1] for cut in cuts]),
            np.concatenate([cut.bounds[1:] for cut in cuts]),
            np.concatenate([cut.rank for cut in cuts]),
            np.repeat(np.arange(len(cuts)), runs),
            np.repeat([parameter.nodes for parameter in parameters], runs),
            parameters[0].width,
            parameters[0].kind == "column",
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

    def before(self, at: Ints, nodes: Ints, low: Ints | int, high: Ints | int) -> Ints:
        """How many elements of a parameter before `at` have a column in [low, high).

        Args:
            nodes: of the parameter; all arguments broadcast.
        """
        if self.by_column:
            return np.clip(at, low * nodes, high * nodes) - low * nodes
        whole, rest = np.divmod(at, self.width)
        return np.asarray(whole * (high - low) + np.clip(rest - low, 0, high - low))

    def count(self, low: Ints | int, high: Ints | int) -> Ints:
        """How many elements of each run have a column in [low, high)."""
        last = self.before(self.end, self.nodes, low, high)
        return last - self.before(self.start, self.nodes, low, high)

    @cached_property
    def touched(self) -> Ints:
        """How many nodes each run holds a part of."""
        return nodes_touched(self.start, self.end, self.nodes, self.width, self.by_column)

    def columns(self, cluster: Cluster) -> Ints:
        """How many columns each rank owns a part of."""
        if self.by_column:
            low, high = self.start // self.nodes, -(-self.end // self.nodes)
            runs, rank = np.stack((low, high), axis=1), self.rank
        else:
            low = np.where(self.length >= self.width, 0, self.start % self.width)
            high = low + np.minimum(self.length, self.width)
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
        new = np.flatnonzero(np.diff(machine, prepend=-1) | np.diff(self.parameter, prepend=-1))
        last = np.append(new[1:], len(machine)) - 1
        rank = np.repeat(machine[new] * size, size) + np.tile(np.arange(size), len(new))
        first, last = np.repeat(new, size), np.repeat(last, size)
        low, high, nodes = slices[rank], slices[rank + 1], self.nodes[first]
        comes = self.before(self.end[last], nodes, low, high) - self.before(
            self.start[first], nodes, low, high
        )
        return Flow(
            inside - stays,
            received - stays,
            cluster.by_rank(self.rank, here) - stays,
            cluster.by_rank(rank, comes) - stays,
        )

    def only(self, parameters: Sequence[int]) -> "Parts":
        """The runs of some of the parameters."""
        kept = np.isin(self.parameter, parameters)
        first = np.unique(self.parameter[kept], return_index=True)[1]
        nodes = self.nodes[kept]
        return Parts(
            self.start[kept],
            self.end[kept],
            self.rank[kept],
            self.parameter[kept],
            nodes,
            self.width,
            self.by_column,
            int(nodes[first].sum()),
        )


def joined(groups: Sequence[Parts]) -> Parts:
    """Groups of equal width as one."""
    before = np.cumsum([0, *(int(group.parameter[-1]) + 1 for group in groups)])
    shifted = [group.parameter + first for group, first in zip(groups, before[:-1], strict=True)]

    def all_of(field: str) -> npt.NDArray[np.int64]:
        return np.concatenate([getattr(group, field) for group in groups])

    return Parts(
        all_of("start"),
        all_of("end"),
        all_of("rank"),
        np.concatenate(shifted),
        all_of("nodes"),
        groups[0].width,
        groups[0].by_column,
        sum(group.all_nodes for group in groups),
    )
