"""Measurement: what the monitor and the dashboard want to know of a plugin's graphs and filter."""

import weakref
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.config import ADAPTIVE, SpectralConfig
from spectral_ds.engines import Engine
from spectral_ds.filters import Regularizer, SpectralFilter
from spectral_ds.laplacian import ParameterGraph
from spectral_ds.monitor import (
    ENOUGH_SAMPLES,
    FEWEST_SAMPLES,
    TOO_NOISY,
    Dashboard,
    GraphFacts,
    Monitor,
    ParameterNorms,
    StepFacts,
    judged_gains,
    verdict,
)
from spectral_ds.spectrum import SignalToNoise, density_of_states
from spectral_ds.stack import Stage

Signal = Sequence[torch.Tensor | None]

DENSITY_BINS = 32
HISTOGRAM_BINS = 40
# In figures, larger groups are estimated: exact eigenvalues of every group would take minutes.
DENSE_NODES = 32


class Measurement:
    """Measures one plugin. Spectra are those of the first graph.

    Args:
        engine, config: of the plugin.
        stages: its graphs.
        spectral_filter: what acts on them.
        regularizer: or None.
    """

    def __init__(
        self,
        engine: Engine,
        config: SpectralConfig,
        stages: Sequence[Stage],
        spectral_filter: SpectralFilter,
        regularizer: Regularizer | None,
    ) -> None:
        self._engine, self._config, self._stages = engine, config, stages
        self._filter, self._regularizer = spectral_filter, regularizer
        self._losses: list[torch.Tensor] = []
        # Of the last monitored step: R, ‖Δ‖ and J; ‖Δ‖ by block.
        self._of_weights: dict[str, float] = {}
        self._perturbation: npt.NDArray[np.float64] | None = None
        self._has_judged = self._is_too_noisy = False
        # Not to keep a graph alive that has been rebuilt.
        self._graph_facts: tuple[weakref.ref[ParameterGraph], GraphFacts] | None = None
        if config.monitor.enabled and stages[0].statistics is not None:
            stages[0].statistics.compare_consecutive()

    def moments(self, signal: Signal, count: int) -> torch.Tensor:
        """Chebyshev moments of a signal on the first graph (collective)."""
        return self._stages[0].spectrometer.moments(signal, count)

    def observe_loss(self, loss: torch.Tensor) -> None:
        """Note the task loss of a micro-batch, of which the joint loss is made."""
        if self._regularizer is not None:
            self._losses.append(loss.detach().float().mean())

    def before_step(
        self, is_due: bool, weights: Callable[[], Signal], norms: ParameterNorms
    ) -> None:
        """Measure what is about to change (collective), and begin the next step.

        That is the regularizer on a monitored step, and a graph that is rebuilt.

        Args:
            is_due: whether the step is monitored.
            weights: gives those of the filtered fragments, None for others.
        """
        if self._config.monitor.enabled and self._stages[0].is_due(self._engine.step):
            self._judge(FEWEST_SAMPLES)
        if is_due and self._regularizer is not None:
            now = weights()
            self._of_weights = self._regularizer.metrics(now)
            self._perturbation = self._perturbation_by_block(now, norms)
            everyone = self._engine.everyone
            own = [sum(map(float, self._losses)), len(self._losses)]  # on some ranks perhaps none
            total = torch.tensor(own, dtype=torch.float64, device=everyone.device)
            loss, count = everyone.sum_(total).tolist()
            if count > 0:
                penalty = self._regularizer.strength * self._of_weights["regularizer"]
                self._of_weights["joint_loss"] = loss / count + penalty
        self._losses.clear()

    def facts(self, step: int) -> Mapping[str, float]:
        """Metrics of a monitored step beside the spectra (collective; synchronizes)."""
        strength = self._filter.schedule.at(step)
        stages = self._stages
        facts = {
            "boundary_bytes": float(sum(stage.bytes_sent(strength) for stage in stages)),
            "strength": strength,
            "skipped_steps": float(self._engine.skipped_steps),
            "nodes": float(sum(stage.graph.num_nodes for stage in stages)),
            "edges": float(sum(stage.graph.num_edges for stage in stages)),
        }
        return facts | self._of_weights | self._signal_to_noise(step) | self._noise_scale()

    def _signal_to_noise(self, step: int) -> dict[str, float]:
        stage = self._stages[0]
        if stage.statistics is None or stage.statistics.running.samples < 2:
            return {}
        self._judge(ENOUGH_SAMPLES)
        found = stage.statistics.signal_to_noise()
        return found.metrics(judged_gains(self._acting(step, self._fixed_gains(found))))

    def _noise_scale(self) -> dict[str, float]:
        """McCandlish et al. (arXiv 1812.06162), eq. 2.8: tr(Σ)/|G|², Σ = batch size · noise."""
        statistics = self._stages[0].statistics
        if statistics is None or statistics.consecutive is None:
            return {}
        _, signal, noise = statistics.consecutive.means.tolist()
        if min(signal, noise) <= 0:
            return {}
        batch = self._engine.batch_size
        name = "gradient_noise_scale" + ("" if batch else "_in_batches")
        return {name: noise / signal * (batch or 1)}

    def _judge(self, fewest: int) -> None:
        """Say once whether the first graph separates, when so many samples tell."""
        stage = self._stages[0]
        if self._has_judged or stage.statistics is None or not stage.filter.is_ready:
            return
        if stage.statistics.samples_on_graph < fewest or stage.graph.num_edges == 0:
            return
        found = stage.statistics.signal_to_noise()
        said = verdict(found.signal, found.noise, self._fixed_gains(found), found.error)
        self._has_judged = said != TOO_NOISY
        if self._has_judged or not self._is_too_noisy:
            self._engine.log(said)
        self._is_too_noisy = not self._has_judged

    def _fixed_gains(self, found: SignalToNoise) -> npt.NDArray[np.float64]:
        """The response by band; 1 if it follows the estimates, which would judge themselves."""
        if self._config.filter.response in ADAPTIVE:
            return np.ones(len(found.centers))
        gains = self._stages[0].filter.transfer.at(2 * found.centers - 1)()
        return gains.cpu().numpy().astype(np.float64)

    def _strength(self, step: int) -> float:
        """s of the last step that was to be filtered; 0 until the graph is known."""
        schedule = self._filter.schedule
        strength = schedule.at(step - step % schedule.interval)
        return strength if self._stages[0].filter.is_ready else 0.0

    def _acting(self, step: int, gains: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """(1 − s) + s · h: what acts, of a response h."""
        return 1 + self._strength(step) * (gains - 1)

    def show(
        self,
        step: int,
        signal: Signal,
        monitor: Monitor,
        dashboard: Dashboard,
        norms: ParameterNorms,
    ) -> None:
        """Draw the figures of a monitored step, if they are due (collective).

        Args:
            signal: the filtered signal.
        """
        bands = range(self._config.monitor.bands)
        before, after = (
            np.array([monitor.metrics[f"band_energy_{when}/{b}"] for b in bands])
            for when in ("before", "after")
        )
        dashboard.record(step, before)
        dashboard.board.lay_out()
        if not dashboard.is_due(step, self._config.monitor.interval):
            return
        stage = self._stages[0]
        graph = self._graph(dashboard)
        middles = (np.arange(DENSITY_BINS) + 0.5) / DENSITY_BINS
        at = stage.filter.transfer.at
        adaptive = None
        if self._config.filter.response in ADAPTIVE:
            centers = (np.arange(self._config.filter.bands) + 0.5) / self._config.filter.bands
            adaptive = at(2 * centers - 1)().cpu().numpy()
        rough = stage.spectrometer.roughness(signal, norms.names)
        what = "update" if "update_norm/after" in monitor.metrics else "gradient"
        statistics = stage.statistics
        is_known = statistics is not None and statistics.running.samples >= 2
        dashboard.show(
            StepFacts(
                before,
                after,
                self._acting(step, at(2 * middles - 1)().cpu().numpy()),
                self._strength(step),
                statistics.signal_to_noise() if statistics is not None and is_known else None,
                adaptive,
                [
                    (
                        "Gradient norm by block and role",
                        "gradient norm",
                        np.sqrt(norms.by_block_and_role(monitor.gradient_squares)),
                    ),
                    (
                        f"Roughness of the filtered {what} by block and role",
                        "share of the highest frequency",
                        norms.by_block_and_role(rough),
                    ),
                ],
                self._perturbation,
            ),
            graph,
        )

    def _perturbation_by_block(
        self, weights: Signal, norms: ParameterNorms
    ) -> npt.NDArray[np.float64] | None:
        if self._regularizer is None or self._regularizer.reference.fragments is None:
            return None
        pairs = zip(weights, self._regularizer.reference.fragments, strict=True)
        moved = [None if w is None or r is None else w - r.to(w.device) for w, r in pairs]
        return np.sqrt(norms.by_block(norms.squares(moved)[0]))

    def _graph(self, dashboard: Dashboard) -> GraphFacts:
        """Facts of the first graph, measured once for each that is built."""
        graph, communicator = self._stages[0].graph, self._engine.communicator
        if self._graph_facts is None or self._graph_facts[0]() is not graph:
            density = density_of_states(
                graph, DENSITY_BINS, communicator, seed=self._config.seed, dense_nodes=DENSE_NODES
            )
            facts = GraphFacts(
                density,
                graph.degree_histogram(HISTOGRAM_BINS),
                graph.weight_histogram(HISTOGRAM_BINS),
            )
            self._graph_facts = weakref.ref(graph), facts
            dashboard.show_graph(facts)
        return self._graph_facts[1]
