"""Gaussian random projections: sketches that keep inner products, on average exactly.

Source: Johnson and Lindenstrauss 1984; E[Ω Ωᵀ] = I for entries N(0, 1/q).
"""

import math

import torch


def sketch_size(width: int, sketch_width: int, longest_whole: int = 0) -> int:
    """Length of a signal's sketch: short signals, or all if `sketch_width` is 0, stay whole.

    Args:
        longest_whole: signals up to this length stay whole, too.
    """
    is_whole = sketch_width == 0 or width <= max(sketch_width, longest_whole)
    return width if is_whole else sketch_width


def gaussian_projection(width: int, sketch_width: int, seed: int) -> torch.Tensor | None:
    """The projection Ω of signals of this width; None where it would not shorten them.

    Returns:
        (width, sketch_width), float64, CPU, entries N(0, 1/sketch_width), drawn from
        `torch.Generator().manual_seed(seed)`: the same on all ranks.
    """
    if sketch_size(width, sketch_width) == width:
        return None
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(
        width, sketch_width, dtype=torch.float64, device="cpu", generator=generator
    )
    return gaussian / math.sqrt(sketch_width)
