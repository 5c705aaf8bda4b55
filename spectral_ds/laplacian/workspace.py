"""Scratch memory, allocated once at attach and shared by all buckets."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from spectral_ds.laplacian.operator import LaplacianOperator


class Scratch(NamedTuple):
    """Views for one bucket: two signals with boundary rows and one without, float32."""

    x: torch.Tensor  # (stored rows, width)
    y: torch.Tensor  # (stored rows, width)
    out: torch.Tensor  # (own rows, width)


class Workspace:
    """Buffers of the size of the largest bucket, and the exchanges' send and receive buffers."""

    def __init__(self, operators: Sequence[LaplacianOperator], device: torch.device) -> None:
        def buffer(sizes: list[int]) -> torch.Tensor:
            return torch.zeros(max(sizes, default=0), device=device)

        blocks = [operator.block for operator in operators]
        stored = buffer([block.stored * block.width for block in blocks])
        self._x, self._y = stored, torch.zeros_like(stored)
        self._out = buffer([block.own * block.width for block in blocks])
        exchanges = [op.exchange for op in operators if op.exchange is not None]
        send = buffer([exchange.elements_sent for exchange in exchanges])
        receive = buffer([exchange.elements_received for exchange in exchanges])
        for exchange in exchanges:
            exchange.use_buffers(send, receive)
        self.bytes = 4 * sum(map(torch.Tensor.numel, (self._x, self._y, self._out, send, receive)))

    def of(self, operator: LaplacianOperator) -> Scratch:
        """This bucket's views; their contents are left from earlier use."""
        block = operator.block
        stored, own = block.stored * block.width, block.own * block.width
        return Scratch(
            self._x[:stored].view(block.stored, block.width),
            self._y[:stored].view(block.stored, block.width),
            self._out[:own].view(block.own, block.width),
        )
