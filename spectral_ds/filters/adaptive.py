"""Gains that follow the running estimates of signal and noise of the gradient."""

import torch

from spectral_ds.spectrum import SignalAndNoise

# Bands with less than this share of the largest power count as having it.
LEAST_POWER = 1e-12


def wiener_gains(estimate: SignalAndNoise) -> torch.Tensor:
    """h_b = S_b/(S_b + N_b): the gains of least squared error (Wiener 1949); (bands,), in [0, 1].

    Bands without power, as all bands before the second sample, keep gain 1.
    """
    total = estimate.signal + estimate.noise
    gain = (estimate.signal / total).clamp(0, 1)
    return gain.where(total > 0, torch.ones_like(gain))


def whiten_gains(power: torch.Tensor, exponent: float) -> torch.Tensor:
    """h_b ∝ (S_b + N_b)^(−p), scaled to keep the total power; (bands,).

    Args:
        power: (bands,): S_b + N_b; all 0 before the first sample, which gives gain 1.
        exponent: p; 1/2 gives all bands equal power, 0 leaves them.
    """
    largest = power.max()
    floored = power.clamp_min(largest * LEAST_POWER)
    shape = (floored / largest) ** -exponent
    gain = shape * (floored.sum() / (shape.square() * floored).sum()).sqrt()
    return gain.where(largest > 0, torch.ones_like(gain))
