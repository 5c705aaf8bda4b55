"""Combining: a tensor of the base model and its changes in tuned ones, filtered into one."""

from collections.abc import Sequence

import torch

from spectral_ds.coactivation import Factors

# Elements that are worked on at once: bounds the memory beyond the tensors themselves.
AT_ONCE = 2**24


def is_unchanged(base: torch.Tensor, tuned: Sequence[torch.Tensor]) -> bool:
    """Whether no model has changed a tensor."""
    return all(torch.equal(each, base) for each in tuned)


def combine(
    base: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    factors: Sequence[Factors] | None,
    rest: float,
    out: torch.Tensor,
) -> None:
    """W₀ + Σ_i ΔW_i G_i; without factors W₀ + rest · mean of ΔW_i.

    Of one model the second is W₀ + rest · ΔW, and with rest 1 it averages several.

    Args:
        base: W₀, (outputs, inputs) or any shape without factors.
        tuned: W₀ + ΔW_i, of the same shape.
        factors: of each model.
        rest: a factor.
        out: takes the result, in its own dtype; may be one of `tuned`.
    """
    work = torch.float64 if torch.float64 in {each.dtype for each in tuned} else torch.float32
    share = rest / len(tuned)
    if base.dim() < 2:
        base, out, tuned = base[None], out[None], [each[None] for each in tuned]
    rows = max(1, AT_ONCE // max(1, base[0].numel()))
    for first in range(0, len(base), rows):
        part = slice(first, first + rows)
        whole = base[part].to(work, copy=True)
        before = base[part].to(work)
        for index, each in enumerate(tuned):
            change = each[part].to(work) - before
            if factors is None:
                whole.add_(change, alpha=share)
            else:
                whole.add_(factors[index].of_rows(change))
        out[part] = whole.to(out.dtype)
