"""Weighted edges as three arrays, and the one rule by which directed edges become undirected."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Edges:
    """Directed edges source → target between nodes, by global node number.

    Attributes:
        source: shape (edges,), int64.
        target: shape (edges,), int64.
        weight: shape (edges,), float64, > 0.
    """

    source: npt.NDArray[np.int64]
    target: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float64]

    @classmethod
    def empty(cls) -> "Edges":
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))

    @classmethod
    def concatenate(cls, parts: "list[Edges]") -> "Edges":
        parts = [cls.empty(), *parts]
        return cls(
            np.concatenate([part.source for part in parts]),
            np.concatenate([part.target for part in parts]),
            np.concatenate([part.weight for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.source)

    def reversed(self) -> "Edges":
        return Edges(self.target, self.source, self.weight)

    def shifted(self, nodes: int) -> "Edges":
        """These edges between nodes whose numbers are higher by `nodes`."""
        return Edges(self.source + nodes, self.target + nodes, self.weight)

    def from_sources(self, nodes: npt.NDArray[np.int64]) -> "Edges":
        """The edges whose source is one of these nodes."""
        kept = np.isin(self.source, nodes)
        return Edges(self.source[kept], self.target[kept], self.weight[kept])

    def by_source(self) -> "Edges":
        """The same edges, sorted by source."""
        order = np.argsort(self.source, kind="stable")
        return Edges(self.source[order], self.target[order], self.weight[order])

    def from_ranges(self, ranges: Sequence[tuple[int, int]]) -> "Edges":
        """The edges whose source is in one of some ranges [first, end); edges sorted by source."""
        bounds = np.searchsorted(self.source, np.array(ranges, np.int64).reshape(-1, 2))
        parts = [slice(first, end) for first, end in bounds.tolist()]
        return Edges.concatenate(
            [Edges(self.source[p], self.target[p], self.weight[p]) for p in parts]
        )

    def repeated(self, copies: int) -> "Edges":
        """Each node becomes `copies` nodes, each edge as many between equal copies."""
        copy = np.tile(np.arange(copies), len(self))
        return Edges(
            np.repeat(self.source, copies) * copies + copy,
            np.repeat(self.target, copies) * copies + copy,
            np.repeat(self.weight, copies),
        )

    def combined(self, rule: np.ufunc) -> "Edges":
        """One edge for each (source, target), sorted by both; equal edges are combined by rule.

        `np.maximum` on directed edges together with their reversed copies makes them undirected
        (w_ij = max of both directions); `np.add` sums edge families.
        """
        if len(self) == 0:
            return self
        order = np.lexsort((self.target, self.source))
        source, target, weight = self.source[order], self.target[order], self.weight[order]
        new = (source[1:] != source[:-1]) | (target[1:] != target[:-1])
        first = np.flatnonzero(np.concatenate(([True], new)))
        return Edges(source[first], target[first], rule.reduceat(weight, first))
