"""Signal and noise of the gradient by frequency, from running means over steps.

A gradient is its expectation (signal) plus what a batch adds by chance (noise). The power of a mean
holds all of the signal but only a part of the noise; two such means tell both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.checkpoint import PartState, Restoration, SavedState, numbers_below
from spectral_ds.sharding import Signal
from spectral_ds.sketches import Sketches
from spectral_ds.spectrum.bands import COEFFICIENTS_PER_BAND, band_coefficients, equal_edges
from spectral_ds.spectrum.running import ConsecutiveSamples, RunningSketch, weight_of_newest
from spectral_ds.spectrum.separation import kept_over_total
from spectral_ds.spectrum.spectrometer import Spectrometer


class SignalAndNoise(NamedTuple):
    """Power per band, lowest first, float64, on the device, equal on all ranks.

    Both are unbiased, so that either may come out negative; all 0 before the second sample.
    """

    signal: torch.Tensor  # (bands,): S_b = ‖P_b E g‖²
    noise: torch.Tensor  # (bands,): N_b = E‖P_b (g − E g)‖²


@dataclass(frozen=True)
class SignalToNoise:
    """Power of signal and noise per equal band of frequency, lowest first.

    Attributes:
        centers: (bands,): the bands' middles, as shares of [0, λ_max].
        signal, noise: (bands,), float64: unbiased, so that either may come out negative.
        samples: gradients that were sampled.
        error: (bands,): standard error of `signal` where there is none; 0 if it is not known.
    """

    centers: npt.NDArray[np.float64]
    signal: npt.NDArray[np.float64]
    noise: npt.NDArray[np.float64]
    samples: int
    error: npt.NDArray[np.float64] | float = 0.0

    @property
    def ratio(self) -> npt.NDArray[np.float64]:
        """(bands,): S_b/N_b; 0 where either is not positive."""
        known = (self.signal > 0) & (self.noise > 0)
        return np.where(known, self.signal, 0) / np.where(known, self.noise, 1)

    def metrics(self, gains: npt.NDArray[np.float64]) -> dict[str, float]:
        """`signal_to_noise/...` of each band, in total, and of what gains keep over the total."""
        signal, noise = self.signal.sum(), self.noise.sum()
        return {
            **{f"signal_to_noise/{b}": float(r) for b, r in enumerate(self.ratio)},
            "signal_to_noise/total": float(signal / noise) if min(signal, noise) > 0 else 0.0,
            "signal_to_noise/kept_over_total": kept_over_total(self.signal, self.noise, gains),
        }


class GradientStatistics:
    """Running means of a gradient's sketches and of its power per band.

    With weights w_t that sum to 1 and ρ = Σ w_t², the mean m of independent gradients has
    E‖P_b m‖² = S_b + ρ N_b, and the mean power E‖P_b g‖² = S_b + N_b: two equations for S and N.
    What E g drifts over the window of the means counts as noise; not so in `consecutive`.
    Samples that are not finite are left out.

    Args:
        sketches: how sketches are taken.
        spectrometer: measures them on the graph.
        bands: number of equal bands of frequency.
        decay: of the running means, which forget older samples by this factor a sample.
        keeps_mean: whether samples of before a new graph count; false if the graph was made of
            them, as they look smoother on it than they are.

    Attributes:
        samples: taken so far.
        samples_on_graph: taken since the graph in use was built.
        running: mean of the sketches.
        power: (bands,): mean of ‖P_b g‖² on this graph, S_b + N_b; all 0 before the first sample.
        estimate: S_b and N_b after the last sample; all 0 before the second.
        consecutive: signal and noise in all by consecutive samples; None unless asked for.
    """

    def __init__(
        self,
        sketches: Sketches,
        spectrometer: Spectrometer,
        *,
        bands: int,
        decay: float,
        keeps_mean: bool = True,
    ) -> None:
        self.sketches = sketches
        self.running = RunningSketch(sketches, decay)
        self.samples = self.samples_on_graph = 0
        self.bands = bands
        self.consecutive: ConsecutiveSamples | None = None
        self._spectrometer = spectrometer
        self._decay, self._keeps_mean = decay, keeps_mean
        device = self.running.mean.device
        coefficients = band_coefficients(equal_edges(bands), COEFFICIENTS_PER_BAND * bands)
        self._band_of_moment = torch.from_numpy(coefficients).to(device)
        # Finite samples since this graph is in use.
        self._measured = torch.zeros((), dtype=torch.float64, device=device)
        self.power = torch.zeros(bands, dtype=torch.float64, device=device)
        # Means of a band's share of a sample's power, and of the share's square.
        self._shares = torch.zeros(2, bands, dtype=torch.float64, device=device)
        self.estimate = SignalAndNoise(self.power, self.power)

    def compare_consecutive(self) -> None:
        """From now on keep the last sample too, and compare the next one with it."""
        self.consecutive = ConsecutiveSamples(self.sketches, self._decay)

    def use_graph(self, spectrometer: Spectrometer, is_new: bool = True) -> None:
        """Go on with a graph on the same nodes; powers by another graph are forgotten.

        Args:
            is_new: whether the graph is another.
        """
        self._spectrometer = spectrometer
        if not is_new:
            return
        if not self._keeps_mean:
            self.running.begin_anew()
        self._forget_powers()

    def begin_anew(self) -> None:
        """Forget all samples."""
        self.running.begin_anew()
        self.samples = 0
        if self.consecutive is not None:
            self.consecutive.go_on_from(torch.zeros_like(self.consecutive.means))
        self._forget_powers()

    def _forget_powers(self) -> None:
        self.samples_on_graph = 0
        self._measured = torch.zeros_like(self._measured)
        self.power = torch.zeros_like(self.power)
        self._shares = torch.zeros_like(self._shares)
        self.estimate = SignalAndNoise(self.power, self.power)

    def state(self, name: str) -> PartState:
        """All of it but `running`, which has a state of its own; equal on all ranks.

        The last sample is not in it: who goes on from it lacks one pair of consecutive ones.

        Args:
            name: of the state.
        """
        pairs = self.consecutive
        # Before the first sample the powers are one tensor; files hold no two of the same memory.
        numbers = {
            "samples": torch.tensor(
                [self.samples, self.samples_on_graph], dtype=torch.float64, device="cpu"
            ),
            "measured": self._measured.reshape(1).clone(),
            "power": self.power,
            "shares": self._shares.reshape(-1).clone(),
            "signal": self.estimate.signal.clone(),
            "noise": self.estimate.noise.clone(),
            "consecutive": self.power.new_zeros(3) if pairs is None else pairs.means,
        }
        return PartState({f"{name}.{number}": tensor for number, tensor in numbers.items()})

    def restore(self, name: str, saved: SavedState) -> Restoration:
        """See `Part.restore`; powers by other bands are left out."""
        numbers = numbers_below(name, saved.numbers)
        return lambda: self._go_on_from(numbers)

    def _go_on_from(self, numbers: Mapping[str, torch.Tensor]) -> None:
        device = self.power.device
        self.samples, self.samples_on_graph = (int(n) for n in numbers["samples"].tolist())
        if self.consecutive is not None and "consecutive" in numbers:  # older files have none
            self.consecutive.go_on_from(numbers["consecutive"])
        if numbers["power"].shape == self.power.shape:
            self._measured = numbers["measured"].to(device, torch.float64).reshape(())
            self.power = numbers["power"].to(device)
            self._shares = numbers["shares"].to(device).view_as(self._shares)
            self.estimate = SignalAndNoise(
                numbers["signal"].to(device), numbers["noise"].to(device)
            )
        else:  # its powers are known of no sample
            self._forget_powers()

    def observe(
        self,
        gradients: Signal,
        scale: float,
        is_finite: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Take one sample (collective; synchronizes nothing with the host).

        Args:
            gradients: this rank's fragments, flat; None counts as zeros.
            scale: by which they are multiplied (loss scaling).
            is_finite: (), bool: whether all other gradients are, on all ranks; None: yes.

        Returns:
            Whether all are finite on all ranks; (), bool, on the device.
        """
        self.samples += 1
        self.samples_on_graph += 1
        current = self.running.take(gradients, scale)
        power = self._power_of(current)
        is_kept = power.sum().isfinite()
        is_finite = is_kept if is_finite is None else is_kept & is_finite
        self._measured = self._measured + is_finite
        weight = weight_of_newest(self._measured, self._decay)
        self.power = self._moved(self.power, power, weight, is_finite)
        share = power / power.sum().clamp_min(torch.finfo(torch.float64).tiny)
        shares = torch.stack((share, share.square()))
        self._shares = self._moved(self._shares, shares, weight, is_finite)
        if self.consecutive is not None:
            self.consecutive.observe(current, power.sum(), is_finite, self._power_in_all)
        self.running.add(current, is_finite)
        self.estimate = self._separated(self._power_of(self.running.mean))
        return is_finite

    def signal_to_noise(self) -> SignalToNoise:
        """The estimate, on the host (it synchronizes)."""
        edges = equal_edges(self.bands)
        signal, noise = (power.cpu().numpy() for power in self.estimate)
        error = self._error_of_signal().cpu().numpy()
        return SignalToNoise((edges[:-1] + edges[1:]) / 2, signal, noise, self.samples, error)

    def _error_of_signal(self) -> torch.Tensor:
        """Where there is no signal, ρ/(1 − ρ) times the standard deviation of ‖P_b g‖².

        Of shares of the power, so that it does not count when gradients grow or shrink as a whole.
        """
        concentration = self.running.concentration
        rest = (1 - concentration).clamp_min(torch.finfo(torch.float64).eps)
        mean, square = self._shares
        variance = (square - mean.square()).clamp_min(0) / rest
        error: torch.Tensor = concentration / rest * variance.sqrt() * self.power.sum()
        return error

    @staticmethod
    def _moved(
        mean: torch.Tensor, value: torch.Tensor, weight: torch.Tensor, is_finite: torch.Tensor
    ) -> torch.Tensor:
        return torch.where(is_finite, mean + weight * (value - mean), mean)

    def _separated(self, power_of_mean: torch.Tensor) -> SignalAndNoise:
        known = (self.running.kept >= 2) & (self._measured >= 1)
        rest = (1 - self.running.concentration).where(known, torch.ones_like(self._measured))
        noise = (self.power - power_of_mean) / rest * known
        return SignalAndNoise((self.power - noise) * known, noise)

    def _power_in_all(self, partial: torch.Tensor) -> torch.Tensor:
        """‖X‖² of a sketched signal."""
        return self._spectrometer.moments_of_sketches(partial, 2)[0]

    def _power_of(self, partial: torch.Tensor) -> torch.Tensor:
        """‖P_b X‖² per band of a sketched signal."""
        count = self._band_of_moment.shape[1]
        return self._band_of_moment @ self._spectrometer.moments_of_sketches(partial, count)
