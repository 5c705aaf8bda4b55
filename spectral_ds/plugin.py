"""SpectralPlugin: what happens at a step, in order.

The only place that sees engine, stack, monitor and checkpoints together.
"""

import logging
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.checkpoint import Persistence
from spectral_ds.config import SpectralConfig
from spectral_ds.engines import Engine
from spectral_ds.filters import Updates
from spectral_ds.laplacian import ParameterGraph
from spectral_ds.monitor import Monitor
from spectral_ds.sharding import Signal
from spectral_ds.spectrum import Density, Eigenpairs, SignalToNoise, squared_norm
from spectral_ds.stack import Newcomers, Stack


class SpectralPlugin:
    """Filters the gradients or updates of one engine at each of its optimizer steps.

    Made by `spectral_ds.initialize` or `spectral_ds.attach`, on every rank (collective).

    Attributes:
        config: the configuration in use.
        engine: whose gradients are filtered.
        stack: the graphs that filter one after another, and what acts by them.
        monitor: what is measured and shown.
        attached: False once detached.
    """

    def __init__(self, engine: Engine, config: SpectralConfig, writer: Any = None) -> None:
        self.config, self.engine = config, engine
        self.stack = Stack(engine, config)
        self._newcomers = Newcomers(engine, config)
        self.monitor = Monitor(engine, config, self.stack, writer)
        self._filters_updates = config.filter.apply_to == "update"
        self._pulls = self.stack.regularizer is not None and (
            config.regularizer.coupling == "decoupled"
        )
        self._updates = Updates(self._filtered_weights()) if self._filters_updates else None
        self._step, self._is_handled, self._climbs = -1, False, 0
        self._is_used = [True] * len(engine.fragments)
        self._never = torch.zeros((), dtype=torch.bool, device=engine.communicator.device)
        self._skipped_steps = engine.skipped_steps
        self.attached = True
        acts_after = self._filters_updates or self._pulls
        engine.install(
            self.before_step,
            self.after_update if acts_after else None,
            self.begin_step if self._filters_updates else None,
        )
        engine.watch_loss(self.observe_loss)
        self._persistence = Persistence(engine, self.stack, config.checkpoint.strict, self.resumed)
        if config.checkpoint.enabled:
            self._persistence.carry()
        engine.when_complete(self._catch_up)
        if self._pulls:
            self.stack.warn_of_unstable_pull()

    def begin_step(self) -> None:
        """What the engine calls when a step has moved no weight yet."""
        self._take_newcomers()
        if self._updates is not None and not self.stack.filter.is_idle(self.engine.step):
            self._updates.remember(self._filtered_weights())

    def before_step(self) -> None:
        """What the engine calls when a step's gradients are there; they may be filtered by hand.

        With a closure, that is after each evaluation of it.
        """
        if not self._is_handled or self.engine.climbs > self._climbs:
            self.filter_gradients()
        self._is_handled = False

    def filter_gradients(self) -> None:
        """One step: the gradients are averaged and not yet clipped.

        To be called by hand only where a training loop clips by itself: after the backward pass
        and before `clip_grad_norm_`, in the closure if the step has one. The hook then leaves these
        gradients alone.
        """
        is_first = self.engine.evaluations == 0  # others are of the closure of the same step
        if is_first:
            self._take_newcomers()
        step = self._step = self.engine.step
        self._is_handled, self._climbs = True, self.engine.climbs
        whole = self.engine.gradients()  # fragments of this rank, writable views
        self.stack.refuse_sparse(self.engine.sparse_gradients())
        found = [gradient is not None for gradient in whole]
        self._is_used = found if is_first else list(map(operator.or_, self._is_used, found))
        gradients, scale = self.stack.only_filtered(whole), self.engine.loss_scale
        is_kept = self._look(step, whole, scale) if is_first else self._never
        if self.stack.regularizer is not None and not self._pulls:
            self.stack.regularizer.add_gradient(gradients, self.stack.weights(), scale)
        if self._updates is None or self.stack.filter.is_idle(step):
            # Neighbours are exchanged on the way.
            with self.monitor.around_filter(step, "gradient", gradients, scale, is_first):
                self.stack.filter.apply(gradients, step, scale, is_kept)
        if self._edits_gradients(step):
            self.engine.gradients_changed()  # norms that were taken too early

    def _look(self, step: int, whole: Signal, scale: float) -> torch.Tensor | None:
        """Measure, sample and rebuild, once a step; whether means may take the gradient in."""
        self._warn_of_skipped_steps()
        self.monitor.begin_step(step, whole, scale)
        is_finite = self._others_are_finite(step, whole)
        gradients = self.stack.only_filtered(whole)
        self.stack.refresh(step)  # new graphs, every refresh_interval
        for graph in self.stack.graphs:  # signal and noise, every statistics.interval
            graph.samples.take(step, gradients, scale, is_finite)
        return is_finite

    def after_update(self) -> None:
        """What the engine calls when the base optimizer has moved its most precise weights."""
        step = self._step
        if self._updates is not None and not self.stack.filter.is_idle(step):
            with self._updates.of(self._filtered_weights()) as moved:
                updates = self._of_used(moved)
                with self.monitor.around_filter(step, "update", updates, 1.0):
                    self.stack.filter.apply(updates, step)
        if self.stack.regularizer is not None and self._pulls:
            self.stack.regularizer.pull(self.stack.weights(), self.engine.learning_rates())

    def _take_newcomers(self) -> None:
        """Filter parameters that are trained from now on too, by another stack (collective)."""
        stack = self._newcomers.join(self.stack)
        if stack is not self.stack:
            self.stack = stack
            self.monitor.use(stack)
            self._persistence.use(stack)
            if self._updates is not None:
                self._updates = Updates(self._filtered_weights())
                self._updates.remember(self._filtered_weights())

    def _catch_up(self) -> None:
        """What the engine calls when ranks are back that had left (collective)."""
        self._persistence.level()
        self.stack.catch_up()

    def _edits_gradients(self, step: int) -> bool:
        adds = self.stack.regularizer is not None and not self._pulls
        return adds or not (self._filters_updates or self.stack.filter.is_idle(step))

    def _filtered_weights(self) -> list[torch.Tensor]:
        """The weights of filtered fragments alone."""
        return [weight for weight in self.stack.weights() if weight is not None]

    def _of_used(self, moved: Sequence[torch.Tensor]) -> Signal:
        """The updates of filtered fragments as a signal.

        Parameters without a gradient are left out, so that they stay as they are.
        """
        updates = iter(moved)
        signal = [next(updates) if chosen else None for chosen in self.stack.is_filtered]
        pairs = zip(signal, self._is_used, strict=True)
        return [update if is_used else None for update, is_used in pairs]

    def _others_are_finite(self, step: int, whole: Signal) -> torch.Tensor | None:
        """Whether the gradients that are not filtered are finite, on all ranks; (), bool.

        None where nobody asks: it matters to means over steps, since engines skip such a step.
        """
        means = self.stack.filter.temporal is not None and not self._filters_updates
        if not (means or any(graph.samples.is_due(step) for graph in self.stack.graphs)):
            return None
        others = self.stack.without_filtered(whole)
        return squared_norm(others, self.engine.communicator).isfinite()

    def _warn_of_skipped_steps(self) -> None:
        skipped = self.engine.skipped_steps
        if skipped > self._skipped_steps:
            message = f"gradients were not finite; the engine has skipped {skipped} steps"
            self.engine.log(message, logging.WARNING)
        self._skipped_steps = skipped

    def observe_loss(self, loss: torch.Tensor) -> None:
        """Tell the task loss of a micro-batch, for the metric `joint_loss`.

        It does not communicate: any rank may call it alone, any number of times. A monitored step
        averages what all ranks observed since the last. DeepSpeed engines observe by themselves in
        `backward`, so do not observe the same loss again; in other loops call it yourself.
        """
        self.monitor.observe_loss(loss)

    def resumed(self) -> None:
        """What a checkpoint calls that sets the engine to another moment."""
        self._is_handled = False
        self._skipped_steps = self.engine.skipped_steps
        self.monitor.forget_weights()

    def detach(self) -> None:
        """Restore everything that was wrapped; the engine then trains as without the plugin."""
        self.engine.remove()
        self.attached = False
        self.monitor.close()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the plugin's state into a folder that all ranks see (collective).

        DeepSpeed's `save_checkpoint` does so by itself.

        Raises:
            OSError: a rank could not write; on all ranks. What was there before is still valid.
        """
        self._persistence.save(Path(folder))

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Go on from a folder that `save` or a DeepSpeed checkpoint (`<tag>/spectral_ds`) wrote.

        At any world size, by any engine, at any ZeRO stage (collective).

        Raises:
            CheckpointError: the folder is missing, cut, altered or of another model or graph; on
                all ranks. With `checkpoint.strict: false` the plugin says so and makes a new graph.
        """
        self._persistence.load(Path(folder))

    def state_dict(self) -> dict[str, Any]:
        """The plugin's state, for `torch.distributed.checkpoint` with FSDP2, DDP and plain modules.

        Tensors of fixed shapes: whole on every rank, or DTensors laid out like their parameters.
        Collective; DeepSpeed's checkpoints carry the state by themselves.
        """
        return self._persistence.tensors()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict` that `torch.distributed.checkpoint.load` has filled.

        Raises:
            CheckpointError: a part that the configuration needs is missing; on all ranks.
        """
        self._persistence.use_tensors(state_dict)

    @property
    def graph(self) -> ParameterGraph:
        """The parameter graph; of several, the first."""
        return self.stack.graphs[0].graph

    def metrics(self) -> dict[str, float]:
        """Metrics of the last monitored step, equal on all ranks: see `Monitor.metrics`."""
        return dict(self.monitor.metrics)

    def band_energies(self) -> dict[str, npt.NDArray[np.float64]]:
        """Shares of energy in equal bands of frequency at the last monitored step.

        Returns:
            "before" and "after" the filter: (bands,), float64, lowest first; empty before the
            first monitored step.
        """
        measured = {"before": self.monitor.before, "after": self.monitor.after}
        return {when: each.shares.copy() for when, each in measured.items() if each is not None}

    def describe(self) -> str:
        """What is attached, for people."""
        settings = self.config.filter
        graphs = "; then ".join(graph.describe() for graph in self.stack.graphs)
        return f"{graphs}; strength {settings.strength:g} on {settings.apply_to}s"

    def eigenpairs(self, k: int, graph: int = 0) -> list[Eigenpairs]:
        """The k lowest eigenpairs of every group of joined parameters (collective).

        Args:
            graph: which of several stacked graphs.

        Raises:
            NotConvergedError: the solver did not reach its residual; on all ranks.
            ValueError: k is not an integer >= 1, or there is no such graph.
        """
        return self.stack.graph(graph).eigenpairs(k)

    def density(self, bins: int, graph: int = 0) -> Density:
        """Share of the graph's eigenvalues in each of equal bins of [0, λ_max] (collective).

        Args:
            graph: which of several stacked graphs.

        Raises:
            ValueError: bins is not an integer >= 1, or there is no such graph.
        """
        return self.stack.graph(graph).density(bins)

    def snr(self, graph: int = 0) -> SignalToNoise:
        """Signal, noise and their ratio per band of frequency, from the samples so far.

        Raises:
            RuntimeError: nothing is sampled: the monitor is off and nothing else needs it.
            ValueError: there is no such graph.
        """
        return self.stack.graph(graph).signal_to_noise()
