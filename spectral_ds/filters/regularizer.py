"""Regularizer: R = ½ Σ tr(Δᵀ (r(L) + ρI) Δ), Δ = θ − θ_ref, and how it acts on the weights.

Source: the spectral regularization of arXiv 2504.19583, whose term is r(λ) = λ, ρ = 0.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np
import torch

from spectral_ds.checkpoint import PartState, Pieces, Restoration, SavedState
from spectral_ds.filters.graph_function import GraphFunction
from spectral_ds.filters.transfer import Transfer
from spectral_ds.laplacian import Shipment
from spectral_ds.sharding import Communicator, Fragment, Signal, squared_norm_of

STATE = "reference"


class Reference:
    """θ_ref: one shard in float32, or nothing.

    Args:
        fragments: this rank's, None where a parameter is not in the graph.
        weights: their values, flat, None likewise; or None for θ_ref = 0.
        device: where to keep it; None: where the weights are.

    Attributes:
        fragments: the values of θ_ref; None for zero.
    """

    def __init__(
        self,
        fragments: Sequence[Fragment | None],
        weights: Signal | None,
        device: torch.device | None = None,
    ) -> None:
        self._fragments = fragments
        self.fragments: list[torch.Tensor | None] | None = None
        if weights is not None:
            self.fragments = [None if w is None else _kept(w, device) for w in weights]

    def move_to(self, weights: Signal) -> None:
        """Take other weights for θ_ref, unless it is zero."""
        if self.fragments is not None:
            for mine, weight in zip(self.fragments, weights, strict=True):
                if mine is not None and weight is not None:
                    mine.copy_(weight)

    def take_over(self, other: "Reference", names: Collection[str]) -> None:
        """Go on with another's values of the fragments of these parameters that both have."""
        if self.fragments is None or other.fragments is None:
            return
        theirs = dict(zip(other._fragments, other.fragments, strict=True))
        for index, fragment in enumerate(self._fragments):
            if fragment in theirs and fragment is not None and fragment.parameter in names:
                self.fragments[index] = theirs[fragment]

    def state(self) -> PartState:
        """See `Part.state`."""
        if self.fragments is None:
            return PartState()
        return PartState({}, {STATE: Pieces.of(self._fragments, self.fragments)})

    def restore(self, saved: SavedState) -> Restoration:
        """See `Part.restore`."""
        if self.fragments is None:
            return lambda: None
        pieces = Pieces.of(self._fragments, self.fragments)
        values = saved.pieces(STATE, pieces.fragments)
        return lambda: pieces.fill(values)

    def squared_distance(self, weights: Signal) -> torch.Tensor:
        """‖θ − θ_ref‖² of this rank's fragments, float64, 0-D."""
        references = self.fragments or [None] * len(weights)
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for weight, reference in zip(weights, references, strict=True):
            if weight is not None:
                moved = weight if reference is None else weight - reference.to(weight.device)
                square = squared_norm_of(moved)
                total = total.to(square.device) + square
        return total


def _kept(weight: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """A copy to keep on a device; on the host it is pinned, so that what reads it need not wait."""
    kept = weight.detach().to(device or weight.device, torch.float32, copy=True)
    is_apart = weight.device.type == "cuda" and kept.device.type == "cpu"
    return kept.pin_memory() if is_apart else kept


class Penalty(Protocol):
    """(r + ρI) Δ on one graph."""

    def add(
        self, reference: Reference, weights: Signal, target: Signal, factors: Sequence[float]
    ) -> None:
        """Target ← target + factor · (r + ρI) Δ, a factor a fragment (collective)."""

    def pull(self, reference: Reference, weights: Signal, steps: Sequence[float]) -> None:
        """Move θ towards θ_ref by such a step, a step a fragment (collective)."""

    def energy(self, reference: Reference, weights: Signal) -> torch.Tensor:
        """tr(Δᵀ (r + ρI) Δ) of what this rank answers for, float64, 0-D (collective)."""


class GraphPenalty:
    """(r(L) + ρI) Δ on one graph.

    Args:
        shipments: the operators of the buckets, together as their weights travel.
        transfer: r.
        ridge: ρ.
    """

    def __init__(self, shipments: Sequence[Shipment], transfer: Transfer, ridge: float) -> None:
        self.transfer = transfer
        self._function = GraphFunction(shipments, transfer)
        self._ridge = ridge

    def largest(self) -> float:
        """The largest r(λ) + ρ on the spectrum (it synchronizes)."""
        return float(self.transfer.at(np.linspace(-1, 1, 1001))().max()) + self._ridge

    def add(
        self, reference: Reference, weights: Signal, target: Signal, factors: Sequence[float]
    ) -> None:
        """target ← target + factor · (r(L) + ρI) Δ, a factor a fragment (collective)."""
        self._function.set(self._ridge, 1.0)
        for shipment in self._function.shipments:
            minus = reference.fragments
            for operator in shipment.carry_difference(weights, minus, target, factors):
                self._function.evaluate(operator)

    def pull(self, reference: Reference, weights: Signal, steps: Sequence[float]) -> None:
        """θ ← θ − step · (r(L) + ρI) Δ, a step a fragment (collective)."""
        self.add(reference, weights, weights, [-step for step in steps])

    def energy(self, reference: Reference, weights: Signal) -> torch.Tensor:
        """tr(Δᵀ (r(L) + ρI) Δ) of what this rank answers for, float64, 0-D (collective)."""
        self._function.set(self._ridge, 1.0)
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for operator in self._function.operators:
            x, _, out = operator.scratch
            operator.load(weights, x, reference.fragments)
            self._function.evaluate(operator)
            operator.load(weights, x, reference.fragments)  # x was overwritten
            for moved, product in zip(x.answered, out.answered, strict=True):
                energy = torch.dot(moved.reshape(-1), product.reshape(-1)).double()
                total = total.to(energy.device) + energy
        return total


class Regularizer:
    """The regularization term on all graphs, and its two couplings to the training.

    Args:
        penalties: gives one for each stacked graph; R is their sum.
        reference: θ_ref.
        strength: α.
        communicator: the ranks that share the parameters.
    """

    def __init__(
        self,
        penalties: Callable[[], Sequence[Penalty]],
        reference: Reference,
        strength: float,
        communicator: Communicator,
    ) -> None:
        self.reference = reference
        self.strength = strength
        self._penalties = penalties
        self._communicator = communicator

    def add_gradient(self, gradients: Signal, weights: Signal, scale: float) -> None:
        """gradients ← gradients + scale · α (r(L) + ρI) Δ: that of the joint loss (collective).

        Args:
            scale: by which the gradients are multiplied (loss scaling).
        """
        factors = [scale * self.strength] * len(gradients)
        for penalty in self._penalties():
            penalty.add(self.reference, weights, gradients, factors)

    def pull(self, weights: Signal, learning_rates: Sequence[float]) -> None:
        """θ ← θ − lr · α (r(L) + ρI) Δ, as decoupled weight decay does (collective).

        Args:
            weights: float32, after the base optimizer's step.
            learning_rates: of each fragment's parameter group, now.
        """
        steps = [rate * self.strength for rate in learning_rates]
        for penalty in self._penalties():
            penalty.pull(self.reference, weights, steps)

    def metrics(self, weights: Signal) -> dict[str, float]:
        """R and ‖Δ‖ over all ranks (collective; synchronizes)."""
        device = self._communicator.device
        energy = sum(
            (p.energy(self.reference, weights).to(device) for p in self._penalties()),
            torch.zeros((), dtype=torch.float64, device=device),
        )
        distance = self.reference.squared_distance(weights).to(device)
        total = self._communicator.sum_(torch.stack((energy, distance))).tolist()
        return {"regularizer": total[0] / 2, "perturbation": total[1] ** 0.5}
