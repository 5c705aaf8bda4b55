"""Scratch memory, allocated once for all operators of a graph, which take turns in it."""

from collections.abc import Sequence

import torch

from spectral_ds.laplacian.operator import LaplacianOperator, Scratch
from spectral_ds.laplacian.shipment import Shipment


def allocate_scratch(
    operators: Sequence[LaplacianOperator],
    shipments: Sequence[Shipment],
    device: torch.device,
    dtype: torch.dtype,
    exchange_dtype: torch.dtype,
) -> int:
    """Give every operator its scratch matrices, and every exchange its buffers.

    All share memory of the size that the largest bucket or shipment needs; it begins as zeros.

    Args:
        dtype, exchange_dtype: of the matrices, and of what travels.

    Returns:
        The bytes that were allocated.
    """

    def buffer(sizes: list[int], dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(max(sizes, default=0), device=device, dtype=dtype)

    blocks = [operator.block for operator in operators]
    x = buffer([block.stored * block.width for block in blocks])
    y = torch.zeros_like(x)
    out = buffer([block.own * block.width for block in blocks])
    boundaries = [op.exchange for op in operators if op.exchange is not None]
    transpositions = [op.transposition for op in operators if op.transposition is not None]
    passing = [e.buffers for e in boundaries] + [s.buffers for s in shipments if s.buffers]
    send = buffer([each.elements_sent for each in passing], exchange_dtype)
    receive = buffer([each.elements_received for each in passing], exchange_dtype)
    staging = None
    if exchange_dtype != dtype:
        staging = buffer(
            [n for e in boundaries for n in (e.buffers.elements_sent, e.buffers.elements_received)]
        )
    for exchange in boundaries:
        exchange.use_buffers(send, receive, staging)
    for transposition in transpositions:
        transposition.use_buffers(send, receive)
    for shipment in shipments:
        shipment.use_buffers(send, receive)
    for operator in operators:
        block = operator.block
        shape, own_shape = (block.stored, block.width), (block.own, block.width)
        stored, own = block.stored * block.width, block.own * block.width
        operator.scratch = Scratch(
            operator.matrix(x[:stored].view(shape)),
            operator.matrix(y[:stored].view(shape)),
            operator.matrix(out[:own].view(own_shape)),
        )
    memory = (x, y, out, send, receive) + (() if staging is None else (staging,))
    return sum(each.nbytes for each in memory)
