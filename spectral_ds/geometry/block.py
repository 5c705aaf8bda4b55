"""The rows of one bucket that this rank stores: own rows, then boundary rows.

A stored row is one node; its columns are those of which this rank owns anything. Every column of a
signal is filtered independently, so a row that a shard boundary cuts is stored with some of its
columns owned and the others received or unused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.geometry.rectangles import Rectangle, addresses
from spectral_ds.graph import Edges
from spectral_ds.sharding import Signal, intervals


@dataclass(frozen=True)
class Placement:
    """A rectangle of a fragment and the (row, column) of the stored matrix where it begins."""

    rectangle: Rectangle
    row: int
    column: int


@dataclass(frozen=True)
class LocalBlock:
    """Where each element of a bucket lies in this rank's (stored rows × width) matrices.

    Attributes:
        bucket_width: columns of the bucket.
        own_rows: sorted node numbers that this rank owns a part of; stored first.
        boundary_rows: sorted node numbers of other ranks' rows with edges to them.
        columns: the columns that are stored.
        needed: addresses that it must receive before each multiply.
        placements: where this rank's fragments are stored.
    """

    bucket_width: int
    own_rows: npt.NDArray[np.int64]
    boundary_rows: npt.NDArray[np.int64]
    columns: intervals.Intervals
    needed: intervals.Intervals
    placements: tuple[Placement, ...]

    @classmethod
    def of(cls, width: int, rectangles: Sequence[Rectangle], edges: Edges) -> "LocalBlock":
        """The block that stores these rectangles and their neighbours.

        Args:
            width: columns of the bucket.
            rectangles: this rank's.
            edges: from its rows.
        """
        owned = addresses(rectangles, width)
        needed = intervals.subtract(_neighbours_of(owned, edges, width), owned)
        own_rows = np.unique(intervals.members(_row_spans(owned, width)))
        touched = np.unique(intervals.members(_row_spans(needed, width)))
        boundary_rows = np.setdiff1d(touched, own_rows, assume_unique=True)
        columns = intervals.merge(
            np.array([(r.column, r.column + r.columns) for r in rectangles], np.int64).reshape(
                -1, 2
            )
        )
        return cls.storing(width, own_rows, boundary_rows, columns, needed, rectangles)

    @classmethod
    def storing(
        cls,
        width: int,
        own_rows: npt.NDArray[np.int64],
        boundary_rows: npt.NDArray[np.int64],
        columns: intervals.Intervals,
        needed: intervals.Intervals,
        rectangles: Sequence[Rectangle],
    ) -> "LocalBlock":
        """The block of given rows and columns; these rectangles lie in own rows."""
        first_row = np.array([r.node for r in rectangles], np.int64)
        first_column = np.array([r.column for r in rectangles], np.int64)
        places = zip(
            rectangles,
            np.searchsorted(own_rows, first_row).tolist(),
            intervals.positions(columns, first_column).tolist(),
            strict=True,
        )
        placements = tuple(Placement(*place) for place in places)
        return cls(width, own_rows, boundary_rows, columns, needed, placements)

    @property
    def width(self) -> int:
        """Number of stored columns."""
        return intervals.total(self.columns)

    @property
    def own(self) -> int:
        """Number of own rows."""
        return len(self.own_rows)

    @property
    def stored(self) -> int:
        """Number of stored rows: own and boundary."""
        return len(self.own_rows) + len(self.boundary_rows)

    @cached_property
    def is_whole(self) -> bool:
        """Whether this rank owns every stored element of its own rows."""
        return sum(place.rectangle.numel for place in self.placements) == self.own * self.width

    def has_rows_of(self, other: "LocalBlock") -> bool:
        """Whether both store the same rows in the same order."""
        return np.array_equal(self.own_rows, other.own_rows) and np.array_equal(
            self.boundary_rows, other.boundary_rows
        )

    def local_rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Stored row number of each node; every one must be stored."""
        at = np.searchsorted(self.own_rows, rows)
        is_own = at < self.own
        is_own[is_own] = self.own_rows[at[is_own]] == rows[is_own]
        return np.where(is_own, at, self.own + np.searchsorted(self.boundary_rows, rows))

    def load(
        self, fragments: Signal, views: Sequence[torch.Tensor], minus: Signal | None = None
    ) -> None:
        """Copy fragment values, less what is subtracted, into own rows.

        Elements that are neither owned nor received keep what they hold: no owned element ever
        depends on them, since columns are filtered independently.

        Args:
            fragments: this rank's flat tensors, any floating dtype; None counts as zeros.
            views: `owned_views` of a (stored, width) matrix.
            minus: what is subtracted, on any device; None where fragments are.
        """
        places, values = self._paired(views, fragments)
        if places:
            torch._foreach_copy_(places, values)
            if minus is not None:
                _, values = self._paired(views, minus)
                torch._foreach_sub_(places, _on(places[0].device, values))
        if len(places) < len(self.placements):
            for view, place in zip(views, self.placements, strict=True):
                if fragments[place.rectangle.fragment] is None:
                    view.zero_()

    def store(self, views: Sequence[torch.Tensor], fragments: Signal) -> None:
        """Copy owned elements back into the fragments, in their own dtype."""
        places, values = self._paired(views, fragments)
        if places:
            torch._foreach_copy_(values, places)

    def add(
        self,
        views: Sequence[torch.Tensor],
        fragments: Signal,
        factors: Sequence[float],
    ) -> None:
        """Add owned elements, times the factor of each fragment, to the fragments."""
        for view, place in zip(views, self.placements, strict=True):
            part = place.rectangle
            fragment = fragments[part.fragment]
            if fragment is not None:
                part.view(fragment).add_(view.to(fragment.device), alpha=factors[part.fragment])

    def owned_views(self, matrix: torch.Tensor) -> list[torch.Tensor]:
        """Views of the owned elements, one a placement."""
        return [
            matrix[
                place.row : place.row + place.rectangle.nodes,
                place.column : place.column + place.rectangle.columns,
            ]
            for place in self.placements
        ]

    def _paired(
        self, views: Sequence[torch.Tensor], fragments: Signal
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Views of the stored elements, in the matrix and in the fragments that there are."""
        places, values = [], []
        for view, place in zip(views, self.placements, strict=True):
            fragment = fragments[place.rectangle.fragment]
            if fragment is not None:
                places.append(view)
                values.append(place.rectangle.view(fragment))
        return places, values


def _row_spans(addresses: intervals.Intervals, width: int) -> intervals.Intervals:
    """For each interval of addresses, the half-open span of rows that it touches."""
    return np.stack((addresses[:, 0] // width, -(-addresses[:, 1] // width)), axis=1)


def _neighbours_of(owned: intervals.Intervals, edges: Edges, width: int) -> intervals.Intervals:
    """Addresses with an edge to an owned one: same column, neighbouring row."""
    pieces = intervals.cut(owned, intervals.members(_row_spans(owned, width)) * width)
    row = pieces[:, 0] // width
    first = np.searchsorted(edges.source, row, side="left")
    last = np.searchsorted(edges.source, row, side="right")
    edge = intervals.members(np.stack((first, last), axis=1))
    shift = (edges.target[edge] - edges.source[edge]) * width
    return intervals.merge(np.repeat(pieces, last - first, axis=0) + shift[:, None])


def _on(device: torch.device, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The values on a device; from pinned memory they come without waiting."""
    return [value.to(device, non_blocking=True) for value in values]
