"""Monitor: measures what is filtered, before and after, on monitored steps.

Synchronizes the device there, and does nothing at all on other steps.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from spectral_ds.monitor.board import Board
from spectral_ds.monitor.norms import ParameterNorms, Signal
from spectral_ds.sharding import Communicator
from spectral_ds.spectrum import COEFFICIENTS_PER_BAND, band_energies


class Monitor:
    """Collects one dictionary of metrics a monitored step and hands it to a board.

    Args:
        squared_norm: gives ‖X‖² of a signal (fragments), summed over ranks.
        moments: gives its first n Chebyshev moments, summed over ranks.
        norms: of all parameters, by block and role.
        board: receives the metrics.
        warn: says something once, on rank 0.
        communicator: of all ranks, for the filter time, which is that of the slowest.
        interval: steps between monitored steps; 0: never.
        bands: number of equal frequency bands.

    Attributes:
        metrics: of the last monitored step, by name, equal on all ranks.
        gradient_squares: ‖gradient‖² of each parameter then; (parameters,).
    """

    def __init__(
        self,
        squared_norm: Callable[[Signal], torch.Tensor],
        moments: Callable[[Signal, int], torch.Tensor],
        norms: ParameterNorms,
        board: Board,
        warn: Callable[[str], None],
        communicator: Communicator,
        *,
        interval: int,
        bands: int,
    ) -> None:
        self.metrics: dict[str, float] = {}
        self.gradient_squares = np.zeros(len(norms.names))
        self._squared_norm = squared_norm
        self._moments = moments
        self._norms = norms
        self._board = board
        self._warn = warn
        self._not_finite = 0
        self._communicator = communicator
        self._interval = interval
        self._bands = bands
        self._filter_started = 0.0
        # Some weights of a monitored step, until the next step tells what became of them.
        self._weights: list[torch.Tensor] | None = None
        self._weight_squares = np.zeros(0)

    def is_due(self, step: int) -> bool:
        return self._interval > 0 and step % self._interval == 0

    def before_step(
        self,
        step: int,
        gradients: Signal,
        weights: Callable[[], Sequence[torch.Tensor]],
        scale: float,
    ) -> None:
        """Norms of all parameters (collective on monitored steps, and on the step after one).

        Args:
            gradients: of this rank's fragments, as the engine averaged them.
            weights: gives those of the same.
            scale: by which the gradients are multiplied (loss scaling).
        """
        ratios: dict[str, float] = {}
        if self._weights is not None:
            torch._foreach_sub_(self._weights, self._norms.thinned(weights()))
            squares = self._norms.squares_of_thinned(self._weights)
            ratios = self._norms.metrics("update_to_weight", squares, self._weight_squares)
            self.metrics |= ratios
            self._board.scalars(ratios)
            self._weights = None
        if self.is_due(step):
            now_held = weights()
            self.gradient_squares, self._weight_squares = self._norms.squares(gradients, now_held)
            self.gradient_squares = self.gradient_squares / scale**2
            self.metrics = {
                "step": float(step),
                **ratios,  # of the step before, if that was monitored too
                **self._norms.metrics("gradient_norm", self.gradient_squares),
                **self._norms.metrics("parameter_norm", self._weight_squares),
            }
            self._weights = [weight.clone() for weight in self._norms.thinned(now_held)]

    def forget(self) -> None:
        """The weights are to be others than the last step left: nothing is known of its update."""
        self._weights = None

    def before_filter(self, step: int, what: str, signal: Signal, scale: float) -> None:
        """Measure the signal as it came (collective on monitored steps).

        Args:
            what: "gradient" or "update".
            scale: by which it is multiplied.
        """
        if self.is_due(step):
            self.metrics |= self._measure(what, "before", signal, scale)
            if not np.isfinite(self.metrics[f"{what}_norm/before"]):
                self._not_finite += 1
                self._warn(f"{what}s are not finite (in {self._not_finite} monitored steps)")
            self._filter_started = self._now()

    def after_filter(
        self,
        what: str,
        signal: Signal,
        scale: float,
        is_changed: bool,
        facts: Callable[[], Mapping[str, float]],
    ) -> None:
        """Measure the filtered signal of a monitored step and write everything (collective).

        Args:
            is_changed: whether the filter did anything.
            facts: gives further metrics of this step.
        """
        seconds = self._communicator.maximum(self._now() - self._filter_started)
        if is_changed:
            self.metrics |= self._measure(what, "after", signal, scale)
        else:
            self.metrics[f"{what}_norm/after"] = self.metrics[f"{what}_norm/before"]
            for band in range(self._bands):
                energy = self.metrics[f"band_energy_before/{band}"]
                self.metrics[f"band_energy_after/{band}"] = energy
        self.metrics |= {"filter_seconds": seconds, **facts()}
        written = ("step", "update_to_weight")  # the latter at its own step
        self._board.scalars({n: v for n, v in self.metrics.items() if not n.startswith(written)})

    def _measure(self, what: str, when: str, signal: Signal, scale: float) -> dict[str, float]:
        count = COEFFICIENTS_PER_BAND * self._bands
        energies = band_energies(self._moments(signal, count).cpu().numpy(), self._bands)
        return {
            f"{what}_norm/{when}": float(self._squared_norm(signal).sqrt()) / scale,
            **{f"band_energy_{when}/{b}": float(e) for b, e in enumerate(energies)},
        }

    def _now(self) -> float:
        if self._communicator.device.type == "cuda":
            torch.cuda.synchronize(self._communicator.device)
        return time.perf_counter()
