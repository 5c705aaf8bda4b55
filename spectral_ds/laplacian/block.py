"""The rows of one bucket that this rank stores: own rows, then boundary rows.

Every column of a signal is filtered independently, so a row that a shard edge cuts is stored
whole, with some of its columns owned and the others received or unused.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.graph import Edges
from spectral_ds.laplacian.buckets import Bucket
from spectral_ds.sharding import Fragment, intervals


@dataclass(frozen=True)
class Placement:
    """A fragment's elements skip, skip + stride, ... lie at [offset, offset + length)."""

    fragment: int
    skip: int
    offset: int
    length: int


@dataclass(frozen=True)
class LocalBlock:
    """Where each element of a bucket lies in this rank's (stored rows × width) matrices.

    Attributes:
        bucket: the bucket.
        own_rows: sorted global node numbers that this rank owns a part of; stored first.
        boundary_rows: sorted global node numbers of other ranks' rows with edges to them.
        owned: addresses that this rank owns.
        needed: addresses that it must receive before each multiply.
        width: columns stored of each row.
        stride: 1: all columns; else every stride-th, and addresses are divided by it.
        placements: where this rank's fragments are stored.
    """

    bucket: Bucket
    own_rows: npt.NDArray[np.int64]
    boundary_rows: npt.NDArray[np.int64]
    owned: intervals.Intervals
    needed: intervals.Intervals
    width: int
    stride: int
    placements: tuple[Placement, ...]

    @classmethod
    def of(cls, bucket: Bucket, fragments: Sequence[Fragment], edges: Edges) -> "LocalBlock":
        """All columns. `fragments` and `edges` are this rank's; edge sources are its own rows."""
        width = bucket.width
        owned = bucket.owned(fragments)
        own_rows = np.unique(intervals.members(_row_spans(owned, width)))
        needed = intervals.subtract(_neighbours_of(owned, edges, width), owned)
        touched = np.unique(intervals.members(_row_spans(needed, width)))
        boundary_rows = np.setdiff1d(touched, own_rows, assume_unique=True)
        return cls._arrange(bucket, fragments, own_rows, boundary_rows, owned, needed, 1)

    def sampled(self, fragments: Sequence[Fragment], stride: int) -> "LocalBlock":
        """The same rows with every stride-th column; the stride divides the width."""
        owned, needed = intervals.every(self.owned, stride), intervals.every(self.needed, stride)
        return self._arrange(
            self.bucket, fragments, self.own_rows, self.boundary_rows, owned, needed, stride
        )

    @classmethod
    def _arrange(
        cls,
        bucket: Bucket,
        fragments: Sequence[Fragment],
        own_rows: npt.NDArray[np.int64],
        boundary_rows: npt.NDArray[np.int64],
        owned: intervals.Intervals,
        needed: intervals.Intervals,
        stride: int,
    ) -> "LocalBlock":
        width = bucket.width // stride

        def stored_at(address: int) -> int:
            return int(np.searchsorted(own_rows, address // width)) * width + address % width

        placements = []
        for index, fragment in enumerate(fragments):
            address = bucket.address(fragment)
            if address is not None:
                skip = -address % stride
                length = -(-(fragment.length - skip) // stride)
                if length > 0:
                    offset = stored_at((address + skip) // stride)
                    placements.append(Placement(index, skip, offset, length))
        return cls(
            bucket,
            own_rows,
            boundary_rows,
            owned,
            needed,
            width,
            stride,
            tuple(placements),
        )

    @property
    def own(self) -> int:
        """Number of own rows."""
        return len(self.own_rows)

    @property
    def stored(self) -> int:
        """Number of stored rows: own and boundary."""
        return len(self.own_rows) + len(self.boundary_rows)

    def local_rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Stored row number of each global row; every row must be stored."""
        at = np.searchsorted(self.own_rows, rows)
        is_own = at < self.own
        is_own[is_own] = self.own_rows[at[is_own]] == rows[is_own]
        return np.where(is_own, at, self.own + np.searchsorted(self.boundary_rows, rows))

    def load(self, fragments: Sequence[torch.Tensor | None], matrix: torch.Tensor) -> None:
        """Copy fragment values into own rows.

        Elements that are neither owned nor received keep what they hold: no owned element ever
        depends on them, since columns are filtered independently.

        Args:
            fragments: this rank's flat tensors, any floating dtype; None counts as zeros.
            matrix: (stored, width), float32, contiguous.
        """
        runs, values = self._paired(matrix, fragments)
        if runs:
            torch._foreach_copy_(runs, values)
        for run, place in zip(self.owned_runs(matrix), self.placements, strict=True):
            if fragments[place.fragment] is None:
                run.zero_()

    def store(self, matrix: torch.Tensor, fragments: Sequence[torch.Tensor | None]) -> None:
        """Copy owned elements back into the fragments, in their own dtype."""
        runs, values = self._paired(matrix, fragments)
        if runs:
            torch._foreach_copy_(values, runs)

    def owned_runs(self, matrix: torch.Tensor) -> list[torch.Tensor]:
        """Flat views of the owned elements, one a placement."""
        flat = matrix.view(-1)
        return [flat[place.offset : place.offset + place.length] for place in self.placements]

    def _paired(
        self, matrix: torch.Tensor, fragments: Sequence[torch.Tensor | None]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Views of the stored elements, in the matrix and in the fragments that there are."""
        runs, values = [], []
        for run, place in zip(self.owned_runs(matrix), self.placements, strict=True):
            fragment = fragments[place.fragment]
            if fragment is not None:
                runs.append(run)
                values.append(fragment[place.skip :: self.stride])
        return runs, values


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
