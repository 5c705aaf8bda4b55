"""SplitBuffers: what one rank sends to each other, and what it receives, in two flat buffers.

They travel as bytes, which every backend takes, whatever their dtype.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from spectral_ds.sharding import Communicator


class SplitBuffers:
    """A send and a receive buffer, peer after peer, and the all-to-all between them.

    Args:
        send_splits, receive_splits: elements by peer rank.
        communicator: the ranks that share the parameters.

    Attributes:
        send, receive: flat; empty until `use` gives them memory.
    """

    def __init__(
        self, send_splits: Sequence[int], receive_splits: Sequence[int], communicator: Communicator
    ) -> None:
        self.send_splits, self.receive_splits = list(send_splits), list(receive_splits)
        self._group = communicator.group
        nothing = torch.empty(0, dtype=torch.float32, device=communicator.device)
        self.use(nothing, nothing)

    @classmethod
    def joined(
        cls, several: Sequence["SplitBuffers"], communicator: Communicator
    ) -> "SplitBuffers":
        """For what several would send and receive, in one all-to-all."""
        return cls(
            [sum(splits) for splits in zip(*(b.send_splits for b in several), strict=True)],
            [sum(splits) for splits in zip(*(b.receive_splits for b in several), strict=True)],
            communicator,
        )

    @property
    def elements_sent(self) -> int:
        return sum(self.send_splits)

    @property
    def elements_received(self) -> int:
        return sum(self.receive_splits)

    def use(self, send: torch.Tensor, receive: torch.Tensor) -> None:
        """Take flat memory of one dtype, shared with other buffers, of at least the needed size."""
        self.send = send[: self.elements_sent]
        self.receive = receive[: self.elements_received]
        self._sent = self.send.view(torch.uint8), [n * send.itemsize for n in self.send_splits]
        bytes_received = [n * receive.itemsize for n in self.receive_splits]
        self._received = self.receive.view(torch.uint8), bytes_received

    def exchange(self) -> None:
        """What ranks have put into `send` comes into `receive` of others (collective)."""
        (sent, sizes), (received, sizes_received) = self._sent, self._received
        dist.all_to_all_single(received, sent, sizes_received, sizes, group=self._group)

    def give_back(self) -> None:
        """What `receive` holds goes back into `send` of those that it came from (collective)."""
        (sent, sizes), (received, sizes_received) = self._sent, self._received
        dist.all_to_all_single(sent, received, sizes, sizes_received, group=self._group)
