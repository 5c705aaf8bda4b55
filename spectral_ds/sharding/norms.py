"""Squared norms that are accurate whatever the length."""

import torch

# On CPUs, torch adds up squares in float32 from one end to the other: of 28 million elements, in a
# norm 0.16 % too small. Blocks of so many elements are added in float64.
BLOCK_ELEMENTS = 2**16


def squared_norm_of(part: torch.Tensor) -> torch.Tensor:
    """‖x‖² of a tensor of any floating dtype; float64, 0-D, on its device."""
    flat = part.reshape(-1)
    blocks = flat.split(BLOCK_ELEMENTS) if flat.device.type == "cpu" else [flat]
    dtype = torch.promote_types(part.dtype, torch.float32)
    return torch.stack(torch._foreach_norm(blocks, 2, dtype)).double().square().sum()
