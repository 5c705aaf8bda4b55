"""Scratch memory, allocated once for all operators of a graph, which take turns in it."""

from collections.abc import Sequence

import torch

from spectral_ds.laplacian.operator import LaplacianOperator, Scratch


def allocate_scratch(
    operators: Sequence[LaplacianOperator], device: torch.device, dtype: torch.dtype
) -> int:
    """Give every operator its scratch matrices, and every exchange its buffers.

    All share memory of the size that the largest bucket needs; it begins as zeros.

    Returns:
        The bytes that were allocated.
    """

    def buffer(sizes: list[int]) -> torch.Tensor:
        return torch.zeros(max(sizes, default=0), device=device, dtype=dtype)

    blocks = [operator.block for operator in operators]
    x = buffer([block.stored * block.width for block in blocks])
    y = torch.zeros_like(x)
    out = buffer([block.own * block.width for block in blocks])
    exchanges = [e for op in operators for e in (op.exchange, op.transposition) if e is not None]
    send = buffer([exchange.buffers.elements_sent for exchange in exchanges])
    receive = buffer([exchange.buffers.elements_received for exchange in exchanges])
    for exchange in exchanges:
        exchange.use_buffers(send, receive)
    for operator in operators:
        block = operator.block
        shape, own_shape = (block.stored, block.width), (block.own, block.width)
        stored, own = block.stored * block.width, block.own * block.width
        operator.scratch = Scratch(
            operator.matrix(x[:stored].view(shape)),
            operator.matrix(y[:stored].view(shape)),
            operator.matrix(out[:own].view(own_shape)),
        )
    return sum(each.numel() * each.element_size() for each in (x, y, out, send, receive))
