"""The boundary exchange: before each multiply, other ranks' elements come into boundary rows.

In: the addresses a rank needs and who owns them. Out: a plan, made once, that one uneven
all-to-all a hop carries out with reused buffers.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from spectral_ds.geometry.block import LocalBlock
from spectral_ds.geometry.owners import RowOwners
from spectral_ds.laplacian.buffers import SplitBuffers
from spectral_ds.sharding import Communicator, intervals


@dataclass
class BoundaryExchange:
    """What one rank sends and receives a hop.

    Attributes:
        receives, sends: by peer rank, the addresses that come and go; each address once.
        buffers: where their elements pass through.
        outgoing, incoming: these elements in the matrix's dtype, flat; the buffers themselves if
            they have the same.
    """

    receives: list[intervals.Intervals]
    sends: list[intervals.Intervals]
    buffers: SplitBuffers
    _receive_chunks: "_Chunks"
    _send_chunks: "_Chunks"
    outgoing: torch.Tensor = field(init=False, repr=False)
    incoming: torch.Tensor = field(init=False, repr=False)

    @classmethod
    def plan(
        cls, block: LocalBlock, owners: RowOwners, communicator: Communicator
    ) -> "BoundaryExchange | None":
        """Ask the owners for the needed addresses (collective); None if no rank needs any."""
        if communicator.maximum(len(block.needed)) == 0:
            return None
        pieces = intervals.cut(block.needed, owners.start)
        peer = owners.of_address(pieces[:, 0])
        order = np.argsort(peer, kind="stable")
        asked, peer = pieces[order], peer[order]
        requests, counts = communicator.exchange_rows(asked, peer)
        world_size = communicator.world_size
        asked_counts = np.bincount(peer, minlength=world_size)
        receives = np.split(asked, np.cumsum(asked_counts)[:-1])
        sends = np.split(requests, np.cumsum(counts)[:-1])
        buffers = SplitBuffers(
            [intervals.total(runs) for runs in sends],
            [intervals.total(runs) for runs in receives],
            communicator,
        )
        return cls(
            receives,
            sends,
            buffers,
            _Chunks.of(asked, block, communicator.device),
            _Chunks.of(requests, block, communicator.device),
        )

    def use_buffers(
        self, send: torch.Tensor, receive: torch.Tensor, staging: torch.Tensor | None = None
    ) -> None:
        """Take flat buffers, shared with other exchanges, of at least the needed size.

        Args:
            staging: of the matrix's dtype, if theirs is another.
        """
        self.buffers.use(send, receive)
        self.outgoing, self.incoming = self.buffers.send, self.buffers.receive
        if staging is not None:
            self.outgoing = staging[: self.buffers.elements_sent]
            self.incoming = staging[: self.buffers.elements_received]

    def run(self, matrix: torch.Tensor) -> None:
        """Fill the received elements of a (stored rows × width) matrix; one all-to-all."""
        flat = matrix.view(-1)
        self._send_chunks.gather(flat, self.outgoing)
        if self.outgoing is not self.buffers.send:
            self.buffers.send.copy_(self.outgoing)
        self.buffers.exchange()
        if self.incoming is not self.buffers.receive:
            self.incoming.copy_(self.buffers.receive)
        self._receive_chunks.scatter(self.incoming, flat)


@dataclass(frozen=True)
class _Chunks:
    """Elements to pick, as indices of chunks of equal length: whole rows where no row is cut."""

    length: int
    index: torch.Tensor

    @classmethod
    def of(
        cls, addresses: intervals.Intervals, block: LocalBlock, device: torch.device
    ) -> "_Chunks":
        edges = np.concatenate((addresses.reshape(-1), block.columns.reshape(-1)))
        length = math.gcd(block.bucket_width, int(np.gcd.reduce(edges, initial=0)))
        chunk = intervals.members(addresses // length)
        per_row = block.bucket_width // length
        column = intervals.positions(block.columns // length, chunk % per_row)
        local = block.local_rows(chunk // per_row) * (block.width // length) + column
        return cls(length, torch.from_numpy(local).to(device))

    def gather(self, flat: torch.Tensor, out: torch.Tensor) -> None:
        chunks = flat.view(-1, self.length)
        torch.index_select(chunks, 0, self.index, out=out.view(-1, self.length))

    def scatter(self, values: torch.Tensor, flat: torch.Tensor) -> None:
        chunks = flat.view(-1, self.length)
        chunks.index_copy_(0, self.index, values.view(-1, self.length))
