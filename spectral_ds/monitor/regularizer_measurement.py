"""What is measured of the regularizer: the term, the perturbation, and the joint loss."""

import numpy as np
import torch

from spectral_ds.filters import Regularizer
from spectral_ds.monitor.norms import ParameterNorms, Values
from spectral_ds.monitor.readings import RegularizerReading
from spectral_ds.sharding import Communicator, Signal


class RegularizerMeasurement:
    """Measures one regularizer.

    Args:
        regularizer: what is measured.
        norms: of all parameters, by block.
        everyone: all ranks; each may observe losses.
    """

    def __init__(
        self, regularizer: Regularizer, norms: ParameterNorms, everyone: Communicator
    ) -> None:
        self._regularizer, self._norms, self._everyone = regularizer, norms, everyone
        self._losses: list[torch.Tensor] = []

    def observe_loss(self, loss: torch.Tensor) -> None:
        """Note the task loss of a micro-batch; no communication, no synchronization."""
        self._losses.append(loss.detach().float().mean())

    def take_over(self, other: "RegularizerMeasurement") -> None:
        """Go on with the losses that another has noted."""
        self._losses = other._losses

    def forget_losses(self) -> None:
        """Begin a new step."""
        self._losses.clear()

    def measure(self, weights: Signal) -> RegularizerReading:
        """Measure R, ‖Δ‖ and the joint loss (collective; synchronizes).

        Args:
            weights: of the filtered fragments, None for others.
        """
        found = self._regularizer.metrics(weights)
        own = [sum(map(float, self._losses)), len(self._losses)]  # on some ranks perhaps none
        total = torch.tensor(own, dtype=torch.float64, device=self._everyone.device)
        loss, count = self._everyone.sum_(total).tolist()
        joint = None
        if count > 0:
            joint = loss / count + self._regularizer.strength * found["regularizer"]
        moved = self._perturbation_by_block(weights)
        return RegularizerReading(found["regularizer"], found["perturbation"], joint, moved)

    def _perturbation_by_block(self, weights: Signal) -> Values | None:
        reference = self._regularizer.reference.fragments
        if reference is None:
            return None
        pairs = zip(weights, reference, strict=True)
        moved = [None if w is None or r is None else w - r.to(w.device) for w, r in pairs]
        return np.sqrt(self._norms.by_block(self._norms.squares(moved)[0]))
