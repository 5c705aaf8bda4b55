"""Rows whose parts lie in several fragments: their products X P, summed over parts and ranks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.laplacian.buffers import SplitBuffers
from spectral_ds.sharding import Communicator

# A matrix of a parameter.
Key: TypeAlias = tuple[str, int]
# Parts of rows: a matrix and its outputs that they belong to.
Parts: TypeAlias = Sequence[tuple[Key, range]]
Indices: TypeAlias = npt.NDArray[np.int64]


class CutRows:
    """One row of numbers for each cut row that this rank has a part of.

    Of each that several ranks have parts of, one answers: which, changes from row to row, so that
    all have as much to add up.

    Args:
        parts: of every rank.
        outputs: of each parameter's matrices.
        columns: numbers a row.
        communicator: the ranks.

    Attributes:
        values: (cut rows, columns), float32.
        bytes_sent: by this rank, in `sum_over_ranks`.
    """

    def __init__(
        self,
        parts: Sequence[Parts],
        outputs: Mapping[str, int],
        columns: int,
        communicator: Communicator,
    ) -> None:
        device, rank = communicator.device, communicator.rank
        keys = sorted({key for own in parts for key, _ in own})
        sizes = [outputs[name] for name, _ in keys]
        starts = np.cumsum([0, *sizes])[:-1].tolist()
        self._start = dict(zip(keys, starts, strict=True))
        held = [self._numbers(own) for own in parts]
        self._numbers_here = held[rank]
        self._first: dict[tuple[Key, int], int] = {}
        for key, rows in parts[rank]:
            at = np.searchsorted(held[rank], self._start[key] + rows.start)
            self._first[key, rows.start] = int(at)
        self.values = torch.zeros(len(held[rank]), columns, dtype=torch.float32, device=device)
        number = np.concatenate([np.zeros(0, np.int64), *held])
        holder = np.repeat(np.arange(len(held)), [len(numbers) for numbers in held])
        order = np.lexsort((holder, number))
        number, holder = number[order], holder[order]
        answering = answering_rank(number, holder)
        shared = answering >= 0
        sends = np.flatnonzero(shared & (holder == rank) & (answering != rank))
        receives = np.flatnonzero(shared & (answering == rank) & (holder != rank))
        sends = sends[np.lexsort((number[sends], answering[sends]))]
        receives = receives[np.lexsort((number[receives], holder[receives]))]
        answered = ~np.isin(held[rank], number[sends])
        self._answered = torch.from_numpy(answered).to(device).float()[:, None]
        self._rows_of = {
            key: slice(*np.searchsorted(held[rank], (start, start + outputs[key[0]])).tolist())
            for key, start in self._start.items()
        }
        self._buffers: SplitBuffers | None = None
        if shared.any():
            peers = communicator.world_size
            self._buffers = SplitBuffers(
                (np.bincount(answering[sends], minlength=peers) * columns).tolist(),
                (np.bincount(holder[receives], minlength=peers) * columns).tolist(),
                communicator,
            )
            self._buffers.use(
                torch.zeros(len(sends) * columns, dtype=torch.float32, device=device),
                torch.zeros(len(receives) * columns, dtype=torch.float32, device=device),
            )
        self._sends = self._local(number[sends], device)
        self._receives = self._local(number[receives], device)
        self.bytes_sent = 4 * columns * (len(sends) + len(receives))

    def clear(self) -> None:
        """Begin a new sum."""
        self.values.zero_()

    def rows(self, key: Key, outputs: range) -> torch.Tensor:
        """(outputs, columns): a view of the rows of one of this rank's parts."""
        first = self._first[key, outputs.start]
        return self.values[first : first + len(outputs)]

    def sum_over_ranks(self) -> None:
        """Every part's rank gets the sum, equal to the bit (collective where ranks share rows)."""
        if self._buffers is None:
            return
        columns = self.values.shape[1]
        send = self._buffers.send.view(-1, columns)
        receive = self._buffers.receive.view(-1, columns)
        torch.index_select(self.values, 0, self._sends, out=send)
        self._buffers.exchange()
        self.values.index_add_(0, self._receives, receive)
        torch.index_select(self.values, 0, self._receives, out=receive)
        self._buffers.give_back()
        self.values.index_copy_(0, self._sends, send)

    def answered(self) -> Iterator[tuple[Key, torch.Tensor]]:
        """By matrix, its rows, zeros in place of those that other ranks answer for (it allocates).

        Over ranks, each cut row is there once.
        """
        for key, rows in self._rows_of.items():
            yield key, self.values[rows] * self._answered[rows]

    def _numbers(self, parts: Parts) -> Indices:
        """The cut rows of a rank, by a number equal on all ranks, ascending."""
        runs = [self._start[key] + np.arange(rows.start, rows.stop) for key, rows in parts]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *runs]))

    def _local(self, numbers: Indices, device: torch.device) -> torch.Tensor:
        return torch.from_numpy(np.searchsorted(self._numbers_here, numbers)).to(device)


def answering_rank(number: Indices, holder: Indices) -> Indices:
    """The rank that answers for each row of each rank; -1 where no other rank has a part of it.

    Args:
        number, holder: (rows,): of a row and of a rank that has a part of it, sorted so.
    """
    distinct, first, count = np.unique(number, return_index=True, return_counts=True)
    chosen = holder[first + distinct % count] if len(distinct) else holder
    return np.repeat(np.where(count > 1, chosen, -1), count)
