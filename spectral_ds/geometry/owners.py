"""RowOwners: which ranks own a part of which row of a bucket."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from spectral_ds.geometry.buckets import Bucket
from spectral_ds.geometry.rectangles import addresses
from spectral_ds.sharding import ShardLayout, intervals


@dataclass(frozen=True)
class RowOwners:
    """The owned intervals of all ranks, sorted by address.

    Attributes:
        start, end, rank: (intervals,).
    """

    bucket: Bucket
    start: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]

    @classmethod
    def of(cls, bucket: Bucket, layout: ShardLayout) -> "RowOwners":
        """The owners of a bucket's rows, from the fragments of every rank."""
        parts = bucket.rectangles_of_ranks(layout)
        owned = [addresses(own, bucket.width) for own in parts]
        runs = np.concatenate(owned)
        rank = np.repeat(np.arange(len(owned)), [len(runs) for runs in owned])
        order = np.argsort(runs[:, 0], kind="stable")
        return cls(bucket, runs[order, 0], runs[order, 1], rank[order])

    def of_address(self, address: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rank that owns each address."""
        return self.rank[np.searchsorted(self.start, address, side="right") - 1]

    def primary(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The one rank that answers for each row.

        It is the owner of the first element of a parameter's first row, of the last of its last,
        and of those on the line between: the work is shared even if all ranks own a part of all
        rows.
        """
        first_node, width = self.bucket.first_node, self.bucket.width
        parameter = np.searchsorted(first_node, rows, side="right") - 1
        number, count = rows - first_node[parameter], np.diff(first_node)[parameter]
        return self.of_address(rows * width + number * width // count)

    def elements(self, world_size: int) -> npt.NDArray[np.int64]:
        """How many elements each rank owns; (world size,)."""
        lengths = (self.end - self.start).astype(np.float64)  # exact below 2^53
        return np.bincount(self.rank, lengths, world_size).astype(np.int64)

    def all_of(
        self, rows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(position in rows, rank) for every rank that owns a part of each row."""
        first = np.searchsorted(self.end, rows * self.bucket.width, side="right")
        last = np.searchsorted(self.start, (rows + 1) * self.bucket.width, side="left")
        position = np.repeat(np.arange(len(rows)), last - first)
        interval = intervals.members(np.stack((first, last), axis=1))
        ranks = int(self.rank.max()) + 1
        pairs = np.unique(position * ranks + self.rank[interval])
        return pairs // ranks, pairs % ranks


def runs_of(ranks: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """(first, last, rank) of each run of equal ranks: rows [first, last)."""
    edges = (np.flatnonzero(np.diff(ranks)) + 1).tolist()
    bounds = pairwise([0, *edges, len(ranks)]) if len(ranks) else ()
    return [(first, last, int(ranks[first])) for first, last in bounds]
