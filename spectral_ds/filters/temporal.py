"""Temporal filter: adds the running mean of past gradients to each gradient.

Source: Grokfast-EMA (arXiv 2405.20233, algorithm 2): slow parts of the gradient are amplified.
"""

from collections.abc import Sequence

import torch

from spectral_ds.sharding import Communicator, squared_norm_of


class TemporalFilter:
    """m ← decay·m + (1 − decay)·g, g ← g + amplify·m; m begins as the first gradient.

    A step whose gradients are not finite on some rank, as engines skip it, leaves m as it is; so
    does a parameter without a gradient. m is one float32 shard.

    Args:
        lengths: elements of each of this rank's fragments.
        communicator: the ranks that share the parameters.
    """

    def __init__(
        self, lengths: Sequence[int], communicator: Communicator, *, decay: float, amplify: float
    ) -> None:
        self._communicator = communicator
        self._decay, self._amplify = decay, amplify
        device = communicator.device
        self.means = [torch.zeros(length, device=device) for length in lengths]
        self.has_mean = torch.zeros(len(lengths), dtype=torch.bool, device=device)

    def apply(
        self,
        gradients: Sequence[torch.Tensor | None],
        scale: float,
        is_finite: torch.Tensor | None = None,
    ) -> None:
        """In place (collective, one all-reduce of a number).

        Args:
            gradients: this rank's fragments, flat, any floating dtype.
            scale: by which they are multiplied (loss scaling).
            is_finite: (), bool: whether all other gradients are, on all ranks; None: yes.
        """
        found = [(i, g) for i, g in enumerate(gradients) if g is not None]
        device = self._communicator.device
        size = torch.zeros((), dtype=torch.float64, device=device)
        for _, gradient in found:
            size += squared_norm_of(gradient).to(device)
        is_kept = self._communicator.sum_(size).isfinite()
        if is_finite is not None:
            is_kept = is_kept & is_finite
        for index, gradient in found:
            mean = self.means[index]
            value = gradient.to(device, torch.float32) / scale
            decay = self._decay * self.has_mean[index]
            torch.where(is_kept, mean * decay + value * (1 - decay), mean, out=mean)
            self.has_mean[index] |= is_kept
            gradient.add_(mean.to(gradient.device), alpha=self._amplify * scale)
