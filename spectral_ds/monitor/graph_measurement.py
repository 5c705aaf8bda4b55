"""What is measured on the first graph: spectra, signal and noise, and whether it separates them."""

import weakref
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from spectral_ds.config import ADAPTIVE, SpectralConfig
from spectral_ds.engines import Engine
from spectral_ds.filters import StrengthSchedule
from spectral_ds.laplacian import ParameterGraph
from spectral_ds.monitor.board import Charts
from spectral_ds.monitor.dashboard import Dashboard
from spectral_ds.monitor.measurement import Measurement, MonitoredStep
from spectral_ds.monitor.norms import ParameterNorms
from spectral_ds.monitor.readings import Energies, FilterReading, GraphReading, StepReading
from spectral_ds.monitor.verdict import (
    ENOUGH_SAMPLES,
    FEWEST_SAMPLES,
    TOO_NOISY,
    judged_gains,
    verdict,
)
from spectral_ds.sharding import Signal
from spectral_ds.spectrum import (
    COEFFICIENTS_PER_BAND,
    SignalToNoise,
    band_energies,
    density_of_states,
)
from spectral_ds.stack import StackedGraph

DENSITY_BINS = 32
HISTOGRAM_BINS = 40
# In figures, larger groups are estimated: exact eigenvalues of every group would take minutes.
DENSE_NODES = 32


class GraphMeasurement(Measurement[Energies]):
    """Measures signals and their filter on one graph of edges.

    Args:
        engine, config: of the plugin.
        graph: what is measured on.
        schedule: the strength of the filter at each step.
        norms: of all parameters.
    """

    charts: ClassVar[Charts] = {
        "energy by frequency, before": ("band_energy_before/",),
        "energy by frequency, after": ("band_energy_after/",),
        "signal to noise by frequency": ("signal_to_noise/",),
        "gradient noise scale": ("gradient_noise_scale",),
    }

    def __init__(
        self,
        engine: Engine,
        config: SpectralConfig,
        graph: StackedGraph,
        schedule: StrengthSchedule,
        norms: ParameterNorms,
    ) -> None:
        self._engine, self._stacked, self._schedule = engine, graph, schedule
        self._bands, self._norms = config.monitor.bands, norms
        self._seed, self._is_enabled = config.seed, config.monitor.enabled
        self._adaptive_bands = config.filter.bands if config.filter.response in ADAPTIVE else None
        self._has_judged = self._is_too_noisy = False
        # Not to keep a graph alive that has been rebuilt.
        self._reading: tuple[weakref.ref[ParameterGraph], GraphReading] | None = None
        if self._is_enabled and graph.samples.statistics is not None:
            graph.samples.statistics.compare_consecutive()

    def energies(self, signal: Signal, norm: float) -> Energies:
        """A signal in equal bands of frequency (collective)."""
        moments = self._stacked.spectrometer.moments(signal, COEFFICIENTS_PER_BAND * self._bands)
        return Energies(norm, band_energies(moments.cpu().numpy(), self._bands))

    def metrics(self, step: MonitoredStep[Energies]) -> dict[str, float]:
        """What is known of the graph at a step, by name."""
        return {**self.signal_to_noise(step.number), **self.noise_scale()}

    def draw(self, step: MonitoredStep[Energies], dashboard: Dashboard) -> None:
        """Draw the figures of a step (collective)."""
        graph = self.graph_reading(dashboard.show_graph)
        rough = self._stacked.spectrometer.roughness(step.signal, self._norms.names)
        reading = StepReading(
            step.what,
            step.before.shares,
            step.after.shares,
            self.filter_reading(step.number),
            self.known_signal_to_noise(),
            gradient_norms=step.gradient_norms,
            roughness=self._norms.by_block_and_role(rough),
            perturbation=step.perturbation,
        )
        dashboard.show(reading, graph)

    def before_rebuild(self, step: int) -> None:
        """Judge a graph that is about to be rebuilt by the samples that there are."""
        if self._is_enabled and self._stacked.is_due(step):
            self._judge(FEWEST_SAMPLES)

    def known_signal_to_noise(self) -> SignalToNoise | None:
        """The estimate; None before the second sample (it synchronizes)."""
        statistics = self._stacked.samples.statistics
        if statistics is None or statistics.running.samples < 2:
            return None
        return statistics.signal_to_noise()

    def signal_to_noise(self, step: int) -> dict[str, float]:
        """`signal_to_noise/...`; nothing before the second sample."""
        found = self.known_signal_to_noise()
        if found is None:
            return {}
        self._judge(ENOUGH_SAMPLES)
        gains = self._fixed_gains(found)
        is_flat = np.ptp(gains) == 0
        return found.metrics(judged_gains(gains) if is_flat else self._acting(step, gains))

    def noise_scale(self) -> dict[str, float]:
        """McCandlish et al. (arXiv 1812.06162), eq. 2.8: tr(Σ)/|G|², Σ = batch size · noise."""
        statistics = self._stacked.samples.statistics
        if statistics is None or statistics.consecutive is None:
            return {}
        _, signal, noise = statistics.consecutive.means.tolist()
        if min(signal, noise) <= 0:
            return {}
        batch = self._engine.batch_size
        name = "gradient_noise_scale" + ("" if batch else "_in_batches")
        return {name: noise / signal * (batch or 1)}

    def filter_reading(self, step: int) -> FilterReading:
        """The filter's gains (it synchronizes)."""
        at = self._stacked.filter.transfer.at
        gains = self._acting(step, at(2 * _middles(DENSITY_BINS) - 1)().cpu().numpy())
        adaptive = None
        if self._adaptive_bands is not None:
            adaptive = at(2 * _middles(self._adaptive_bands) - 1)().cpu().numpy()
        return FilterReading(self._strength(step), gains, adaptive)

    def graph_reading(self, show: Callable[[GraphReading], None]) -> GraphReading:
        """The graph, measured once for each that is built (collective).

        Args:
            show: called with what has been measured anew.
        """
        graph, communicator = self._stacked.graph, self._engine.communicator
        if self._reading is None or self._reading[0]() is not graph:
            density = density_of_states(
                graph, DENSITY_BINS, communicator, seed=self._seed, dense_nodes=DENSE_NODES
            )
            reading = GraphReading(
                density,
                graph.degree_histogram(HISTOGRAM_BINS),
                graph.weight_histogram(HISTOGRAM_BINS),
            )
            self._reading = weakref.ref(graph), reading
            show(reading)
        return self._reading[1]

    def _judge(self, fewest: int) -> None:
        """Say once whether the graph separates, when so many samples tell."""
        graph, statistics = self._stacked, self._stacked.samples.statistics
        if self._has_judged or statistics is None or not graph.filter.is_ready:
            return
        if statistics.samples_on_graph < fewest or graph.graph.num_edges == 0:
            return
        found = statistics.signal_to_noise()
        said = verdict(found.signal, found.noise, self._fixed_gains(found), found.error)
        self._has_judged = said != TOO_NOISY
        if self._has_judged or not self._is_too_noisy:
            self._engine.log(said)
        self._is_too_noisy = not self._has_judged

    def _fixed_gains(self, found: SignalToNoise) -> npt.NDArray[np.float64]:
        """The response by band; 1 if it follows the estimates, which would judge themselves."""
        if self._adaptive_bands is not None:
            return np.ones(len(found.centers))
        gains = self._stacked.filter.transfer.at(2 * found.centers - 1)()
        return gains.cpu().numpy().astype(np.float64)

    def _strength(self, step: int) -> float:
        """s of the last step that was to be filtered; 0 until the graph is known."""
        strength = self._schedule.at(step - step % self._schedule.interval)
        return strength if self._stacked.filter.is_ready else 0.0

    def _acting(self, step: int, gains: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """(1 − s) + s · h: what acts, of a response h."""
        return 1 + self._strength(step) * (gains - 1)


def _middles(bands: int) -> npt.NDArray[np.float64]:
    """The middles of equal bands of [0, 1]."""
    return (np.arange(bands) + 0.5) / bands
