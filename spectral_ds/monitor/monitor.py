"""Monitor: all that is measured of a plugin and shown, on monitored steps.

It synchronizes the device there, and does nothing at all on other steps.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from spectral_ds.config import SpectralConfig
from spectral_ds.engines import Engine
from spectral_ds.monitor.board import Board
from spectral_ds.monitor.coactivation_measurement import CoactivationMeasurement
from spectral_ds.monitor.dashboard import Dashboard
from spectral_ds.monitor.graph_measurement import GraphMeasurement
from spectral_ds.monitor.measurement import Filtered, Measurement, MonitoredStep
from spectral_ds.monitor.norms import ParameterNorms
from spectral_ds.monitor.readings import Energies, RegularizerReading
from spectral_ds.monitor.regularizer_measurement import RegularizerMeasurement
from spectral_ds.monitor.replicas import ReplicaCheck
from spectral_ds.sharding import Signal
from spectral_ds.spectrum import squared_norm
from spectral_ds.stack import CoactivationGraph, Stack

# Written at a step of their own, or not at all.
WRITTEN_ELSEWHERE = ("step", "update_to_weight")


class Monitor:
    """Measures one plugin, and shows it on a board. Spectra are those of the first graph.

    Args:
        engine, config, stack: of the plugin.
        writer: a `SummaryWriter` of the user's, on rank 0; None: see `Board.open`.

    Attributes:
        metrics: of the last monitored step, by name, equal on all ranks; empty before the first.
            `step`; of all trainable parameters `gradient_norm/all` and `parameter_norm/all`, and
            from the next step on `update_to_weight/all`, ‖θ_new − θ_old‖/‖θ_old‖, of which every
            17th element tells where a parameter has more than 262,144; the same by block and role
            as `gradient_norm_by_block/b`, `gradient_norm_by_role/r` and so on;
            `gradient_norm/before` and `/after` of the filtered parameters (`update_norm` if
            updates are filtered); `band_energy_before/b` and `band_energy_after/b`, shares of
            energy in equal bands of frequency, lowest first, or, on a graph of activations, in
            bands of directions, `others` and the numbers of others such as `03-04`, and
            `active_energy/...`, `most_active_energy/...`: shares along the known and the 32 most
            active directions, `before`, `after` and `by_chance`; once two gradients were sampled,
            `signal_to_noise/b`, `/total` and `/kept_over_total`, of (1 − s) + s·h(λ) at the
            current strength s, and, from consecutive samples, `gradient_noise_scale` in examples
            where both estimates are positive (`gradient_noise_scale_in_batches` if the engine does
            not know its batch size); `filter_seconds` of the slowest rank; `boundary_bytes` that
            all ranks sent in the step; `strength`; `skipped_steps` so far; `nodes`; `edges`. With
            a regularizer: `regularizer`, R; `perturbation`, ‖θ − θ_ref‖; and `joint_loss`,
            task + α · R, where a rank observed the task loss.
        before, after: the filtered signal by frequency, before and after the filter; None until
            they are measured.
    """

    def __init__(
        self, engine: Engine, config: SpectralConfig, stack: Stack, writer: Any = None
    ) -> None:
        settings = config.monitor
        self._engine, self._config = engine, config
        self._interval = settings.interval if settings.enabled else 0
        self._board = Board.open(engine, settings.folder, settings.enabled, writer)
        self._regularizer: RegularizerMeasurement | None = None
        self.use(stack)
        self.metrics: dict[str, float] = {}
        self.before: Energies | None = None
        self.after: Energies | None = None
        self._of_regularizer: RegularizerReading | None = None
        self._not_finite = 0
        self._replicas = ReplicaCheck(engine)
        self._has_said_incomplete = False

    def use(self, stack: Stack) -> None:
        """Measure another stack of the same engine from now on; `metrics` stay."""
        engine, config = self._engine, self._config
        self._stack = stack
        self._norms = ParameterNorms(engine.shapes, engine.fragments, engine.communicator)
        self._graph = _measurement(engine, config, stack, self._norms)
        before, self._regularizer = self._regularizer, None
        if stack.regularizer is not None:
            self._regularizer = RegularizerMeasurement(
                stack.regularizer, self._norms, engine.everyone
            )
            if before is not None:
                self._regularizer.take_over(before)
        self._dashboard = Dashboard(
            self._board,
            config.filter.response,
            self._norms.blocks,
            self._norms.roles,
            config.monitor.figures_interval,
        )
        self._gradient_squares = np.zeros(len(self._norms.names))
        self._weight_squares = np.zeros(0)
        # Some weights of a monitored step, until the next step tells what became of them.
        self._weights: list[torch.Tensor] | None = None

    def say_if_written_nowhere(self) -> None:
        """Tell the user, if so, that only `metrics` has what is measured."""
        if self._interval > 0 and not self._board.is_kept:
            self._engine.log(
                "what is monitored is written nowhere, plugin.metrics() has it; set "
                "spectral_ds.monitor.folder, or switch on the engine's own monitor (DeepSpeed: "
                '"tensorboard": {"enabled": true})'
            )

    def is_due(self, step: int) -> bool:
        """Whether a step is monitored: none from which ranks may have left."""
        if self._interval == 0 or step % self._interval > 0:
            return False
        if not self._engine.is_complete and not self._has_said_incomplete:
            self._engine.log(
                "steps inside join(), which ranks may have left, are filtered but not monitored, "
                "and graphs are rebuilt when it ends; throw_on_early_termination=True keeps all "
                "ranks together"
            )
            self._has_said_incomplete = True
        return self._engine.is_complete

    def observe_loss(self, loss: torch.Tensor) -> None:
        """Note the task loss of a micro-batch, of which the joint loss is made."""
        if self._regularizer is not None:
            self._regularizer.observe_loss(loss)

    def forget_weights(self) -> None:
        """The weights are to be others than the last step left: nothing is known of its update."""
        self._weights = None

    def close(self) -> None:
        """Close what it has opened by itself."""
        self._board.close()

    def begin_step(self, step: int, gradients: Signal, scale: float) -> None:
        """Measure what is about to change: gradients, weights, a graph that is rebuilt.

        Collective on monitored steps, on the step after one, and where a graph is rebuilt.

        Args:
            gradients: of this rank's fragments, as the engine averaged them.
            scale: by which they are multiplied (loss scaling).
        """
        ratios = self._update_to_weight()
        if self.is_due(step):
            weights = self._engine.weights()
            squares, self._weight_squares = self._norms.squares(gradients, weights)
            self._replicas.compare(step, self._norms.names, self._weight_squares)
            self._gradient_squares = squares / scale**2
            self.before = self.after = None
            self.metrics = {
                "step": float(step),
                **ratios,  # of the step before, if that was monitored too
                **self._norms.metrics("gradient_norm", self._gradient_squares),
                **self._norms.metrics("parameter_norm", self._weight_squares),
            }
            self._weights = [weight.clone() for weight in self._norms.thinned(weights)]
        self._graph.before_rebuild(step)
        if self._regularizer is not None:
            if self.is_due(step):
                self._of_regularizer = self._regularizer.measure(self._stack.weights())
            self._regularizer.forget_losses()

    def _update_to_weight(self) -> dict[str, float]:
        """What the step before has changed, if it was monitored."""
        if self._weights is None:
            return {}
        if self._weights:  # a rank may own none
            torch._foreach_sub_(self._weights, self._norms.thinned(self._engine.weights()))
        squares = self._norms.squares_of_thinned(self._weights)
        ratios = self._norms.metrics("update_to_weight", squares, self._weight_squares)
        self.metrics |= ratios
        self._board.scalars(ratios)
        self._weights = None
        return ratios

    @contextmanager
    def around_filter(
        self, step: int, what: Filtered, signal: Signal, scale: float, is_first: bool = True
    ) -> Iterator[None]:
        """Measure a signal before and after the body has filtered it, in place, and show all.

        Collective on monitored steps.

        Args:
            what: what the signal is.
            signal: this rank's fragments, None for what is not filtered.
            scale: by which it is multiplied.
            is_first: whether it is the first of this step; others are not measured.
        """
        if not (is_first and self.is_due(step)):
            yield
            return
        self.before = self._energies(signal, scale)
        self._warn_unless_finite(what)
        started = self._now()
        yield
        seconds = self._engine.everyone.maximum(self._now() - started)
        is_changed = not self._stack.filter.is_idle(step)
        self.after = self._energies(signal, scale) if is_changed else self.before
        of_regularizer = self._of_regularizer
        monitored = MonitoredStep(
            step,
            what,
            signal,
            self.before,
            self.after,
            np.sqrt(self._norms.by_block_and_role(self._gradient_squares)),
            None if of_regularizer is None else of_regularizer.perturbation_by_block,
        )
        self._report(monitored, seconds)
        self._draw(monitored)

    def _energies(self, signal: Signal, scale: float) -> Energies:
        norm = float(squared_norm(signal, self._engine.communicator).sqrt()) / scale
        found: Energies = self._graph.energies(signal, norm)
        return found

    def _warn_unless_finite(self, what: Filtered) -> None:
        if self.before is not None and not np.isfinite(self.before.norm):
            self._not_finite += 1
            self._engine.log(
                f"{what}s are not finite (in {self._not_finite} monitored steps)", logging.WARNING
            )

    def _report(self, step: MonitoredStep[Energies], seconds: float) -> None:
        """Complete the metrics of a monitored step, and write them (collective)."""
        graphs, strength = self._stack.graphs, self._stack.filter.schedule.at(step.number)
        self.metrics |= {
            **step.before.metrics(step.what, "before"),
            **step.after.metrics(step.what, "after"),
            "filter_seconds": seconds,
            "boundary_bytes": float(self._stack.bytes_sent(strength)),
            "strength": strength,
            "skipped_steps": float(self._engine.skipped_steps),
            "nodes": float(sum(graph.graph.num_nodes for graph in graphs)),
            "edges": float(sum(graph.graph.num_edges for graph in graphs)),
            **({} if self._of_regularizer is None else self._of_regularizer.metrics()),
            **self._graph.metrics(step),
        }
        written = {n: v for n, v in self.metrics.items() if not n.startswith(WRITTEN_ELSEWHERE)}
        self._board.scalars(written)

    def _draw(self, step: MonitoredStep[Energies]) -> None:
        """Draw the figures of a monitored step, if they are due (collective)."""
        self._dashboard.record(step.number, step.before.shares)
        self._board.lay_out(self._graph.charts)
        if self._dashboard.is_due(step.number, self._interval):
            self._graph.draw(step, self._dashboard)

    def _now(self) -> float:
        device = self._engine.everyone.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()


def _measurement(
    engine: Engine, config: SpectralConfig, stack: Stack, norms: ParameterNorms
) -> Measurement[Any]:
    """What measures on the first graph."""
    graph, schedule = stack.graphs[0], stack.filter.schedule
    if isinstance(graph, CoactivationGraph):
        return CoactivationMeasurement(engine, config, graph, schedule, norms)
    return GraphMeasurement(engine, config, graph, schedule, norms)
