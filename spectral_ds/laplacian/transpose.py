"""The transpose exchange: rows sharded over ranks become slices of columns that hold every row.

One all-to-all brings a signal into slices, where any function of L is local because columns are
filtered independently; one brings it back. Two shards travel, less what stays, whatever the graph.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.geometry.block import LocalBlock
from spectral_ds.geometry.rectangles import Rectangle
from spectral_ds.laplacian.buffers import SplitBuffers
from spectral_ds.sharding import Communicator, Signal, intervals


def column_slices(elements: npt.NDArray[np.int64], width: int) -> tuple[int, ...]:
    """Where each rank's slice of columns begins, and the last ends; (ranks + 1,).

    Ranks get columns in proportion to the elements they own, so that the work stays divided as it
    was and little travels.
    """
    share = np.cumsum([0, *elements]) / max(int(elements.sum()), 1)
    return tuple(np.rint(share * width).astype(np.int64).tolist())


@dataclass
class Transposition:
    """What one rank sends and receives to transpose one bucket; as much goes back to undo it.

    Attributes:
        block: all rows, and this rank's slice of columns; its placements are what stays here.
        sends: rectangles of this rank's fragments, by peer.
        receives: rectangles of this rank's slice that other ranks own, by peer.
        buffers: where their elements pass through.
        largest: elements of the bucket that the rank owns that owns most.
    """

    block: LocalBlock
    sends: list[list[Rectangle]]
    receives: list[list[Rectangle]]
    buffers: SplitBuffers
    largest: int
    # The part of a buffer that holds each rectangle.
    _send_views: list[torch.Tensor] = field(default_factory=list)
    _receive_views: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def plan(
        cls,
        nodes: int,
        rectangles: Sequence[Sequence[Rectangle]],
        slices: Sequence[int],
        communicator: Communicator,
    ) -> "Transposition":
        """No communication: all ranks know the fragments of all.

        Args:
            nodes: of the bucket.
            rectangles: of every rank.
            slices: see `column_slices`.
        """
        rank = communicator.rank

        def clipped(parts: Sequence[Rectangle], owner: int) -> list[Rectangle]:
            cut = (part.clipped(slices[owner], slices[owner + 1]) for part in parts)
            return [part for part in cut if part is not None]

        peers = range(communicator.world_size)
        sends = [[] if p == rank else clipped(rectangles[rank], p) for p in peers]
        receives = [[] if p == rank else clipped(rectangles[p], rank) for p in peers]
        own_width = slices[rank + 1] - slices[rank]
        rows = np.arange(nodes if own_width else 0)
        none = np.zeros((0, 2), np.int64)
        block = LocalBlock.storing(
            own_width,
            rows,
            rows[:0],
            intervals.merge(np.array([[0, own_width]], np.int64)),
            none,
            clipped(rectangles[rank], rank),
        )
        buffers = SplitBuffers(
            [sum(part.numel for part in parts) for parts in sends],
            [sum(part.numel for part in parts) for parts in receives],
            communicator,
        )
        largest = max(sum(part.numel for part in parts) for parts in rectangles)
        return cls(block, sends, receives, buffers, largest)

    def use_buffers(self, send: torch.Tensor, receive: torch.Tensor) -> None:
        """Take flat buffers, shared with other exchanges, of at least the needed size."""
        self.buffers.use(send, receive)
        [self._send_views] = segments(self.buffers.send, [self.sends])
        [self._receive_views] = segments(self.buffers.receive, [self.receives])

    def places(self, matrix: torch.Tensor) -> list[torch.Tensor]:
        """Views of a (nodes, slice) matrix where what comes from other ranks lies."""
        return [
            matrix[part.node : part.node + part.nodes, part.column : part.column + part.columns]
            for parts in self.receives
            for part in parts
        ]

    def load(
        self,
        fragments: Signal,
        owned: Sequence[torch.Tensor],
        received: list[torch.Tensor],
        minus: Signal | None = None,
    ) -> None:
        """Bring the signal, less what is subtracted, into slices (collective).

        Args:
            fragments: this rank's flat tensors, any floating dtype; None counts as zeros.
            owned, received: views of a (nodes, slice) matrix: of what stays, and `places`.
            minus: see `LocalBlock.load`.
        """
        self.block.load(fragments, owned, minus)
        self.pack(fragments, self._send_views, minus)
        self.buffers.exchange()
        copy(received, self._receive_views)

    def pack(
        self, fragments: Signal, views: Sequence[torch.Tensor], minus: Signal | None = None
    ) -> None:
        """Views of a send buffer ← what leaves this rank; None counts as zeros."""
        for view, part in zip(views, _flat(self.sends), strict=True):
            fragment = fragments[part.fragment]
            subtracted = None if minus is None else minus[part.fragment]
            if fragment is None:
                view.zero_()
            elif subtracted is None:
                view.copy_(part.view(fragment))
            else:  # a buffer of lower precision rounds the difference, not what it is of
                values = (part.view(each).to(view.device) for each in (fragment, subtracted))
                torch.sub(*values, out=view)

    def unpack(self, views: Sequence[torch.Tensor], fragments: Signal) -> None:
        """The fragments ← what has come back into views of a send buffer."""
        for view, part, fragment in self._returned(views, fragments):
            part.view(fragment).copy_(view)

    def add(
        self, views: Sequence[torch.Tensor], fragments: Signal, factors: Sequence[float]
    ) -> None:
        """The fragments ← themselves + the factor of each · what has come back."""
        for view, part, fragment in self._returned(views, fragments):
            part.view(fragment).add_(view.to(fragment.device), alpha=factors[part.fragment])

    def _returned(
        self, views: Sequence[torch.Tensor], fragments: Signal
    ) -> Iterator[tuple[torch.Tensor, Rectangle, torch.Tensor]]:
        """(values, rectangle, fragment) of all that this rank sent."""
        for view, part in zip(views, _flat(self.sends), strict=True):
            fragment = fragments[part.fragment]
            if fragment is not None:
                yield view, part, fragment


def copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Each target ← its source; there may be none."""
    if targets:
        torch._foreach_copy_(targets, sources)


def _flat(by_peer: list[list[Rectangle]]) -> list[Rectangle]:
    return [part for parts in by_peer for part in parts]


def segments(
    buffer: torch.Tensor, moves: Sequence[list[list[Rectangle]]]
) -> list[list[torch.Tensor]]:
    """The part of the buffer that holds each rectangle, by move; in the buffer, peers come first.

    Args:
        moves: rectangles by peer, of each move.
    """
    views: list[list[torch.Tensor]] = [[] for _ in moves]
    end = 0
    for of_peer in zip(*moves, strict=True):
        for found, parts in zip(views, of_peer, strict=True):
            for part in parts:
                start, end = end, end + part.numel
                found.append(buffer[start:end].view(part.nodes, part.columns))
    return views
