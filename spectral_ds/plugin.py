"""SpectralPlugin: what happens at a step, in order.

The only place that sees engine, stack, monitor and checkpoints together.
"""

import functools
import logging
import operator
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from spectral_ds.checkpoint import Persistence
from spectral_ds.config import SpectralConfig
from spectral_ds.engines import Engine
from spectral_ds.engines.steps import not_compiled
from spectral_ds.filters import Updates
from spectral_ds.monitor import Monitor
from spectral_ds.sharding import Signal
from spectral_ds.spectrum import squared_norm
from spectral_ds.stack import Newcomers, Stack
from spectral_ds.study import Study


def _plainly(work: Callable[["SpectralPlugin"], None]) -> Callable[["SpectralPlugin"], None]:
    """A part of a step that torch.autocast around it does not round, and autograd does not see."""

    @functools.wraps(work)
    def plainly(plugin: "SpectralPlugin") -> None:
        device = plugin.engine.communicator.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            work(plugin)

    return plainly


class SpectralPlugin(Study):
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
        self.config, self.engine, self.attached = config, engine, False
        with ExitStack() as refused:  # nothing stays hooked then
            self.stack = Stack(engine, config)
            refused.callback(self.stack.forget)
            self.monitor = Monitor(engine, config, self.stack, writer)
            refused.callback(self.monitor.close)
            self._prepare()
            refused.callback(engine.remove)
            self._hook()
            refused.pop_all()
        self.attached = True

    def _prepare(self) -> None:
        engine, config = self.engine, self.config
        self._newcomers = Newcomers(engine, config)
        self._filters_updates = config.filter.apply_to == "update"
        self._pulls = self.stack.regularizer is not None and (
            config.regularizer.coupling == "decoupled"
        )
        self._updates = Updates(self._filtered_weights()) if self._filters_updates else None
        self._step, self._is_handled, self._climbs = -1, False, 0
        self._filter_gradients = not_compiled(self._filter_by_graphs)
        self._is_used = [True] * len(engine.fragments)
        self._never = torch.zeros((), dtype=torch.bool, device=engine.communicator.device)
        self._skipped_steps = engine.skipped_steps
        self._persistence = Persistence(engine, self.stack, config.checkpoint.strict, self.resumed)

    def _hook(self) -> None:
        if self._pulls:
            self.stack.warn_of_unstable_pull()
        acts_after = self._filters_updates or self._pulls
        self.engine.install(
            self.before_step,
            self.after_update if acts_after else None,
            self.begin_step if self._filters_updates else None,
        )
        self.engine.watch_loss(self.observe_loss)
        if self.config.checkpoint.enabled:
            self._persistence.carry()
        self.engine.when_complete(self._catch_up)

    @_plainly
    def begin_step(self) -> None:
        """What the engine calls when a step has moved no weight yet."""
        self._take_newcomers()
        if self._updates is not None and self.stack.may_act(self.engine.step):
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
        gradients alone. Does nothing once the plugin is detached.
        """
        if self.attached:
            self._filter_gradients()

    @_plainly
    def _filter_by_graphs(self) -> None:
        """`filter_gradients`, which torch.compile of a training loop leaves as it is."""
        has_climbed = self._is_handled and self.engine.climbs > self._climbs  # by a first half
        is_first = self.engine.evaluations == 0 and not has_climbed  # of a closure's, others follow
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
            graph.sample(step, gradients, scale, is_finite)
        return is_finite

    @_plainly
    def after_update(self) -> None:
        """What the engine calls when the base optimizer has moved its most precise weights."""
        step = self._step
        if self._updates is not None and not self.stack.filter.is_idle(step):
            weights = self._filtered_weights()
            now, before = self._of_used(weights), self._of_used(self._updates.before)
            if self.monitor.is_due(step) or not self.stack.filter.move(now, before, step):
                with self._updates.of(weights) as moved:
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
            # Of a step whose gradients were filtered before newcomers came.
            self._is_used = [each is not None for each in self.engine.gradients()]
            if self._updates is not None:
                self._updates = Updates(self._filtered_weights())
                self._updates.remember(self._filtered_weights())
        self._persistence.begin_step()
        self.stack.begin_step(self.engine.step)

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
        if not (means or any(graph.samples_at(step) for graph in self.stack.graphs)):
            return None
        others = self.stack.without_filtered(whole)
        return squared_norm(others, self.engine.communicator).isfinite()

    def _warn_of_skipped_steps(self) -> None:
        skipped = self.engine.skipped_steps
        if skipped > self._skipped_steps:
            message = f"gradients were not finite; the engine has skipped {skipped} steps"
            self.engine.log(message, logging.WARNING)
        self._skipped_steps = skipped

    def resumed(self) -> None:
        """What a checkpoint calls that sets the engine to another moment."""
        self._is_handled = False
        self._skipped_steps = self.engine.skipped_steps
        self.monitor.forget_weights()

    def detach(self) -> None:
        """Restore everything that was wrapped; the engine then trains as without the plugin."""
        self.stack.warn_of_end()
        self.engine.remove()
        self.stack.forget()
        self.attached = False
        self.monitor.close()
