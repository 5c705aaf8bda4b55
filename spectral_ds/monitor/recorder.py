"""Monitor: measures the gradient before and after the filter on monitored steps.

Synchronizes the device there, and does nothing at all on other steps.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.sharding import Communicator
from spectral_ds.spectrum import band_energies

# Chebyshev moments a band: enough that a band's smooth edges stay within its neighbours.
MOMENTS_PER_BAND = 4


class Monitor:
    """Collects one dictionary of metrics a monitored step and hands it to a writer.

    Args:
        squared_norm: gives ‖X‖² of a signal (fragments), summed over ranks.
        moments: gives its first n Chebyshev moments, summed over ranks.
        write: receives the metrics; must itself see to it that one rank writes.
        warn: says something once, on rank 0.
        communicator: of all ranks, for the filter time, which is that of the slowest.
        interval: steps between monitored steps; 0: never.
        bands: number of equal frequency bands.
    """

    def __init__(
        self,
        squared_norm: Callable[[Sequence[torch.Tensor | None]], torch.Tensor],
        moments: Callable[[Sequence[torch.Tensor | None], int], torch.Tensor],
        write: Callable[[Mapping[str, float]], None],
        warn: Callable[[str], None],
        communicator: Communicator,
        *,
        interval: int,
        bands: int,
    ) -> None:
        self.metrics: dict[str, float] = {}
        self._squared_norm = squared_norm
        self._moments = moments
        self._write = write
        self._warn = warn
        self._not_finite = 0
        self._communicator = communicator
        self._interval = interval
        self._bands = bands
        self._filter_started = 0.0

    def is_due(self, step: int) -> bool:
        return self._interval > 0 and step % self._interval == 0

    def before_filter(self, step: int, gradients: Sequence[torch.Tensor | None]) -> None:
        """Measure the gradient as the engine averaged it (collective on monitored steps)."""
        if self.is_due(step):
            self.metrics = {"step": float(step), **self._measure("before", gradients)}
            if not np.isfinite(self.metrics["gradient_norm/before"]):
                self._not_finite += 1
                self._warn(f"gradients are not finite (in {self._not_finite} monitored steps)")
            self._filter_started = self._now()

    def after_filter(
        self, step: int, gradients: Sequence[torch.Tensor | None], facts: Mapping[str, float]
    ) -> None:
        """Measure the filtered gradient and write everything (collective on monitored steps).

        Args:
            facts: further metrics of this step.
        """
        if self.is_due(step):
            seconds = self._communicator.maximum(self._now() - self._filter_started)
            self.metrics |= self._measure("after", gradients)
            self.metrics |= {"filter_seconds": seconds, **facts}
            self._write({name: value for name, value in self.metrics.items() if name != "step"})

    def _measure(self, when: str, gradients: Sequence[torch.Tensor | None]) -> dict[str, float]:
        count = MOMENTS_PER_BAND * self._bands
        moments: npt.NDArray[np.float64] = self._moments(gradients, count).cpu().numpy()
        energies = band_energies(moments, self._bands)
        return {
            f"gradient_norm/{when}": float(self._squared_norm(gradients).sqrt()),
            **{f"band_energy_{when}/{b}": float(e) for b, e in enumerate(energies)},
        }

    def _now(self) -> float:
        if self._communicator.device.type == "cuda":
            torch.cuda.synchronize(self._communicator.device)
        return time.perf_counter()
