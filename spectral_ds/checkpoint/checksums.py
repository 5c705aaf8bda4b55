"""Checksums that do not depend on how a tensor is cut: those of its parts add up to that of the
whole. They tell accidents, not attacks."""

import torch

# Integers of the size of an element, to read its bits as.
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
BLOCK_ELEMENTS = 2**22


def checksum(part: torch.Tensor, start: int) -> int:
    """Σ (2i + 1) · bits_i modulo 2^64, as int64 has it.

    Args:
        part: flat, any dtype.
        start: i of its first element in the whole.
    """
    total = 0
    for block in part.detach().contiguous().split(BLOCK_ELEMENTS):
        bits = block.view(_INTEGER[block.element_size()]).long()
        odd = torch.arange(start, start + len(bits), device=bits.device) * 2 + 1
        total = add(total, int((bits * odd).sum()))  # wraps around
        start += len(bits)
    return total


def add(first: int, second: int) -> int:
    """The sum of two checksums."""
    return (first + second + 2**63) % 2**64 - 2**63
