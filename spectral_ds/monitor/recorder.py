"""Monitor: measures what is filtered, before and after, on monitored steps.

Synchronizes the device there, and does nothing at all on other steps.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.sharding import Communicator
from spectral_ds.spectrum import COEFFICIENTS_PER_BAND, band_energies


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

    def before_filter(self, step: int, what: str, signal: Sequence[torch.Tensor | None]) -> None:
        """Measure the signal as it came (collective on monitored steps).

        Args:
            what: "gradient" or "update".
        """
        if self.is_due(step):
            self.metrics = {"step": float(step), **self._measure(what, "before", signal)}
            if not np.isfinite(self.metrics[f"{what}_norm/before"]):
                self._not_finite += 1
                self._warn(f"{what}s are not finite (in {self._not_finite} monitored steps)")
            self._filter_started = self._now()

    def after_filter(
        self,
        step: int,
        what: str,
        signal: Sequence[torch.Tensor | None],
        facts: Callable[[], Mapping[str, float]],
    ) -> None:
        """Measure the filtered signal and write everything (collective on monitored steps).

        Args:
            facts: gives further metrics of this step.
        """
        if self.is_due(step):
            seconds = self._communicator.maximum(self._now() - self._filter_started)
            self.metrics |= self._measure(what, "after", signal)
            self.metrics |= {"filter_seconds": seconds, **facts()}
            self._write({name: value for name, value in self.metrics.items() if name != "step"})

    def _measure(
        self, what: str, when: str, signal: Sequence[torch.Tensor | None]
    ) -> dict[str, float]:
        count = COEFFICIENTS_PER_BAND * self._bands
        moments: npt.NDArray[np.float64] = self._moments(signal, count).cpu().numpy()
        energies = band_energies(moments, self._bands)
        return {
            f"{what}_norm/{when}": float(self._squared_norm(signal).sqrt()),
            **{f"band_energy_{when}/{b}": float(e) for b, e in enumerate(energies)},
        }

    def _now(self) -> float:
        if self._communicator.device.type == "cuda":
            torch.cuda.synchronize(self._communicator.device)
        return time.perf_counter()
