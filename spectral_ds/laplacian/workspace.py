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

        width_of = [operator.block.bucket.width for operator in operators]
        stored = [op.block.stored * width for op, width in zip(operators, width_of, strict=True)]
        own = [op.block.own * width for op, width in zip(operators, width_of, strict=True)]
        self._x, self._y, self._out = buffer(stored), buffer(stored), buffer(own)
        exchanges = [op.exchange for op in operators if op.exchange is not None]
        send = buffer([exchange.elements_sent for exchange in exchanges])
        receive = buffer([exchange.elements_received for exchange in exchanges])
        for exchange in exchanges:
            exchange.use_buffers(send, receive)
        self.bytes = 4 * sum(map(torch.Tensor.numel, (self._x, self._y, self._out, send, receive)))

    def of(self, operator: LaplacianOperator) -> Scratch:
        """This bucket's views; their contents are left from earlier use."""
        block = operator.block
        width = block.bucket.width
        stored, own = block.stored * width, block.own * width
        return Scratch(
            self._x[:stored].view(block.stored, width),
            self._y[:stored].view(block.stored, width),
            self._out[:own].view(block.own, width),
        )
