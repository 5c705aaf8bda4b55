"""Scratch memory, allocated once at attach and shared by all buckets."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from spectral_ds.laplacian.operator import LaplacianOperator


class Scratch(NamedTuple):
    """Views for one bucket: two signals with boundary rows and one without."""

    x: torch.Tensor  # (stored rows, width)
    y: torch.Tensor  # (stored rows, width)
    out: torch.Tensor  # (own rows, width)


class Workspace:
    """Buffers of the size of the largest bucket, and the exchanges' send and receive buffers."""

    def __init__(
        self,
        operators: Sequence[LaplacianOperator],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        def buffer(sizes: list[int]) -> torch.Tensor:
            return torch.zeros(max(sizes, default=0), device=device, dtype=dtype)

        blocks = [operator.block for operator in operators]
        stored = buffer([block.stored * block.width for block in blocks])
        self._x, self._y = stored, torch.zeros_like(stored)
        self._out = buffer([block.own * block.width for block in blocks])
        moves = [m for op in operators for m in (op.exchange, op.transposition) if m is not None]
        send = buffer([move.elements_sent for move in moves])
        receive = buffer([move.elements_received for move in moves])
        for move in moves:
            move.use_buffers(send, receive)
        buffers = (self._x, self._y, self._out, send, receive)
        self.bytes = sum(each.numel() * each.element_size() for each in buffers)
        self._scratch = {}
        for operator in operators:
            scratch = self._scratch[id(operator)] = self._views(operator)
            operator.remember(*scratch)

    def of(self, operator: LaplacianOperator) -> Scratch:
        """This bucket's views; their contents are left from earlier use."""
        return self._scratch[id(operator)]

    def _views(self, operator: LaplacianOperator) -> Scratch:
        block = operator.block
        stored, own = block.stored * block.width, block.own * block.width
        return Scratch(
            self._x[:stored].view(block.stored, block.width),
            self._y[:stored].view(block.stored, block.width),
            self._out[:own].view(block.own, block.width),
        )
