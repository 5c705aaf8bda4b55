"""The few collectives the package needs, on one process group.

Works without torch.distributed too (one process), so that nothing above has a special case.
"""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

T = TypeVar("T")


class Communicator:
    """One process group and the device its collectives run on.

    Args:
        group: the ranks that share the parameters' shards; None is the default group.
        device: where tensors of the collectives live (gloo: CPU, NCCL: this rank's GPU).
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group = group
        self.device = device
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if distributed else 0
        self.world_size = dist.get_world_size(group) if distributed else 1

    @classmethod
    def alone(cls, device: torch.device) -> "Communicator":
        """A group of this process only: for parameters that every rank holds whole."""
        communicator = cls.__new__(cls)
        communicator.group, communicator.device = None, device
        communicator.rank, communicator.world_size = 0, 1
        return communicator

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        is_cuda = self.device.type == "cuda"  # by NCCL, objects travel by the current device
        with torch.cuda.device(self.device) if is_cuda else nullcontext():
            dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group)
        return tensor

    def maximum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest of all ranks' values, element by element, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def maximum(self, value: float) -> float:
        """The largest of all ranks' values (at attach and on monitor steps: it synchronizes)."""
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        return float(self.maximum_(tensor).item())

    def exchange_rows(
        self, rows: npt.NDArray[Any], destinations: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Send row i to rank destinations[i]; at attach only.

        Args:
            rows: shape (n, columns), int64 or float64, equal columns and dtype on all ranks.
            destinations: shape (n,).

        Returns:
            The rows that came, ordered by source rank (and as that rank had them), and how many
            came from each rank, shape (world size,).
        """
        order = np.argsort(destinations, kind="stable")
        sent = np.bincount(destinations, minlength=self.world_size).astype(np.int64)
        outgoing = torch.from_numpy(np.ascontiguousarray(rows[order])).to(self.device)
        if self.world_size == 1:
            return outgoing.cpu().numpy(), sent
        send_counts = torch.from_numpy(sent).to(self.device)
        receive_counts = torch.empty_like(send_counts)
        dist.all_to_all_single(receive_counts, send_counts, group=self.group)
        received = receive_counts.cpu().numpy()
        incoming = outgoing.new_empty((int(received.sum()), rows.shape[1]))
        dist.all_to_all_single(
            incoming, outgoing, received.tolist(), sent.tolist(), group=self.group
        )
        return incoming.cpu().numpy(), received

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Run a body without collectives; if it raises on any rank, raise on every rank.

        A rank whose own body raised re-raises it; the others raise an error of the same type, where
        they can have it, that names the failing rank and repeats its message.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.maximum(float(error is not None)) == 0:
            return
        failure = None if error is None else (_sendable(type(error)), str(error))
        failures = self.gather_objects(failure)
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise _same_error(*failure, rank)


def _sendable(kind: type[Exception]) -> type[Exception]:
    """The type, or RuntimeError for one that other processes could not find, as of some extensions.

    Failing to send an error would leave the other ranks waiting for it.
    """
    try:
        pickle.dumps(kind)
    except (pickle.PicklingError, AttributeError, ImportError):
        return RuntimeError
    return kind


def _same_error(kind: type[Exception], message: str, rank: int) -> Exception:
    message = f"rank {rank} failed: {message}"
    try:
        return kind(message)
    except TypeError:  # a type that wants more than a message
        return RuntimeError(message)
