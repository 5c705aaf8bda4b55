"""Temporal filter: adds the running mean of past gradients to each gradient.

Source: Grokfast-EMA (arXiv 2405.20233, algorithm 2): slow parts of the gradient are amplified.
"""

from collections.abc import Collection, Sequence

import torch

from spectral_ds.checkpoint import PartState, Pieces, Restoration, SavedState
from spectral_ds.sharding import Communicator, Fragment, Signal, squared_norm_of

STATE, HAS_MEAN = "temporal", "temporal.has_mean"


class TemporalFilter:
    """m ← decay·m + (1 − decay)·g, g ← g + amplify·m; m begins as the first gradient.

    A step whose gradients are not finite on some rank, as engines skip it, leaves m as it is; so
    does a parameter without a gradient. m is one float32 shard.

    Args:
        fragments: this rank's, None for one that is not filtered.
        parameters: names of all parameters, in model order, equal on all ranks.
        communicator: the ranks that share the parameters.

    Attributes:
        means: m of each fragment; empty where it is not filtered.
        has_mean: (fragments,), bool: whether m has begun.
    """

    def __init__(
        self,
        fragments: Sequence[Fragment | None],
        parameters: Sequence[str],
        communicator: Communicator,
        *,
        decay: float,
        amplify: float,
    ) -> None:
        self._communicator = communicator
        self._decay, self._amplify = decay, amplify
        device = communicator.device
        self._fragments = fragments
        self._position = {name: index for index, name in enumerate(parameters)}
        lengths = [0 if fragment is None else fragment.length for fragment in fragments]
        self.means = [torch.zeros(length, dtype=torch.float32, device=device) for length in lengths]
        self.has_mean = torch.zeros(len(lengths), dtype=torch.bool, device=device)

    def apply(
        self,
        gradients: Signal,
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
            decay = self._decay * self.has_mean[index].float()
            torch.where(is_kept, mean * decay + value * (1 - decay), mean, out=mean)
            self.has_mean[index] |= is_kept
            gradient.add_(mean.to(gradient.device), alpha=self._amplify * scale)

    def take_over(self, other: "TemporalFilter", names: Collection[str]) -> None:
        """Go on with another's means of the fragments of these parameters that both have."""
        theirs = {fragment: index for index, fragment in enumerate(other._fragments)}
        for index, fragment in enumerate(self._fragments):
            if fragment in theirs and fragment is not None and fragment.parameter in names:
                self.means[index] = other.means[theirs[fragment]]
                self.has_mean[index] = other.has_mean[theirs[fragment]]

    def _begin_anew(self) -> None:
        for mean in self.means:
            mean.zero_()
        self.has_mean = torch.zeros_like(self.has_mean)

    def state(self) -> PartState:
        """See `Part.state`."""
        has_mean = torch.zeros(len(self._position), dtype=torch.float64, device="cpu")
        for fragment, flag in zip(self._fragments, self.has_mean.tolist(), strict=True):
            if fragment is not None:
                has_mean[self._position[fragment.parameter]] += flag
        communicator = self._communicator
        # A parameter's fragments lie on several ranks.
        anywhere = communicator.sum_(has_mean.to(communicator.device)).sign().cpu()
        return PartState({HAS_MEAN: anywhere}, {STATE: Pieces.of(self._fragments, self.means)})

    def restore(self, saved: SavedState) -> Restoration:
        """See `Part.restore`; without a saved mean, it begins with the next gradient."""
        if HAS_MEAN not in saved.numbers:
            return self._begin_anew
        means = saved.pieces(STATE, Pieces.of(self._fragments, self.means).fragments)
        has_mean = saved.numbers[HAS_MEAN].tolist()

        def put_in_place() -> None:
            Pieces.of(self._fragments, self.means).fill(means)
            flags = [
                fragment is not None and has_mean[self._position[fragment.parameter]] > 0
                for fragment in self._fragments
            ]
            self.has_mean = torch.tensor(flags, device=self.has_mean.device)

        return put_in_place
