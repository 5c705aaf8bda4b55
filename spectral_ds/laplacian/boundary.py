"""The boundary exchange: before each multiply, other ranks' elements come into boundary rows.

In: the addresses a rank needs and who owns them. Out: a plan, made once, that one uneven
all-to-all a hop carries out with reused buffers.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from spectral_ds.geometry.block import LocalBlock
from spectral_ds.geometry.owners import RowOwners
from spectral_ds.sharding import Communicator, intervals


@dataclass
class BoundaryExchange:
    """What one rank sends and receives a hop.

    Attributes:
        receives, sends: by peer rank, the addresses that come and go; each address once.
        receive_splits, send_splits: elements by peer rank.
    """

    communicator: Communicator
    receives: list[intervals.Intervals]
    sends: list[intervals.Intervals]
    receive_splits: list[int]
    send_splits: list[int]
    _receive_chunks: "_Chunks"
    _send_chunks: "_Chunks"
    _receive_buffer: torch.Tensor
    _send_buffer: torch.Tensor

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
        empty = torch.empty(0, device=communicator.device)
        return cls(
            communicator,
            receives,
            sends,
            [intervals.total(runs) for runs in receives],
            [intervals.total(runs) for runs in sends],
            _Chunks.of(asked, block, communicator.device),
            _Chunks.of(requests, block, communicator.device),
            empty,
            empty,
        )

    @property
    def elements_received(self) -> int:
        return sum(self.receive_splits)

    @property
    def elements_sent(self) -> int:
        return sum(self.send_splits)

    def use_buffers(self, send: torch.Tensor, receive: torch.Tensor) -> None:
        """Take flat buffers, shared with other exchanges, of at least the needed size."""
        self._send_buffer = send[: self.elements_sent]
        self._receive_buffer = receive[: self.elements_received]

    def run(self, matrix: torch.Tensor) -> None:
        """Fill the received elements of a (stored rows × width) matrix; one all-to-all."""
        flat = matrix.view(-1)
        self._send_chunks.gather(flat, self._send_buffer)
        dist.all_to_all_single(
            self._receive_buffer,
            self._send_buffer,
            self.receive_splits,
            self.send_splits,
            group=self.communicator.group,
        )
        self._receive_chunks.scatter(self._receive_buffer, flat)


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
