"""SpectralPlugin: what happens at a step, in order.

The only place that sees both engines and graphs. `stage.py` reads the configuration of each graph.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.checkpoint.persistence import Persistence
from spectral_ds.config import SpectralConfig, SpectralConfigError
from spectral_ds.console.progress import progress
from spectral_ds.engines import Engine
from spectral_ds.filters import (
    NormKeeper,
    Reference,
    Regularizer,
    SpectralFilter,
    StrengthSchedule,
    TemporalFilter,
    Updates,
)
from spectral_ds.laplacian import (
    KernelUnavailableError,
    ParameterGraph,
    require_kernel,
)
from spectral_ds.monitor import Board, Dashboard, Monitor, ParameterNorms
from spectral_ds.monitor.measurement import Measurement
from spectral_ds.sharding import ShardLayout
from spectral_ds.spectrum import (
    Density,
    Eigenpairs,
    SignalToNoise,
    density_of_states,
    lowest_eigenpairs,
    squared_norm,
)
from spectral_ds.stack import GraphChoice, Stage, choose_graphs, head_width_of

Signal = Sequence[torch.Tensor | None]


class SpectralPlugin:
    """Filters the gradients or updates of one engine at each of its optimizer steps.

    Made by `spectral_ds.initialize` or `spectral_ds.attach`, on every rank (collective).

    Attributes:
        config: the configuration in use.
        stages: the graphs that filter one after another, each with what acts on it.
        is_filtered: whether each of the engine's fragments is of a parameter in some graph.
        attached: False once detached.
    """

    def __init__(self, engine: Engine, config: SpectralConfig, writer: Any = None) -> None:
        self.config = config
        self.engine = engine
        chosen = self._agree_on_graphs()
        layout = ShardLayout.gather(engine.fragments, engine.communicator)
        nodes = {node.name: node for choice in chosen for node in choice.parameters}
        layout.check({name: node.numel for name, node in nodes.items()})
        self.is_filtered = [fragment.parameter in nodes for fragment in engine.fragments]
        self.stages = [
            Stage(choice, config, engine, layout, config.regularizer.ridge * (not index))
            for index, choice in enumerate(chosen)
        ]
        self.filter = self._build_filter(list(nodes))
        self.regularizer = self._build_regularizer()
        self._updates = Updates(self._filtered_weights()) if self._acts_on_updates else None
        self.norms = ParameterNorms(engine.shapes, engine.fragments, engine.communicator)
        self.measurement = Measurement(engine, config, self.stages, self.filter, self.regularizer)
        board = self._open_board(writer)
        self.monitor = Monitor(
            lambda signal: squared_norm(signal, engine.communicator),
            self.measurement.moments,
            self.norms,
            board,
            self._warn,
            engine.everyone,
            interval=config.monitor.interval if config.monitor.enabled else 0,
            bands=config.monitor.bands,
        )
        self.dashboard = Dashboard(
            board,
            config.filter.response,
            self.norms.blocks,
            self.norms.roles,
            config.monitor.figures_interval,
        )
        self._step, self._is_handled = -1, False
        self._is_used = [True] * len(engine.fragments)
        self._skipped_steps = engine.skipped_steps
        self.attached = True
        acts_after = self._acts_on_updates or self._pulls
        engine.install(self.before_step, self.after_update if acts_after else None)
        engine.watch_loss(self.measurement.observe_loss)
        self._persistence = Persistence(self)
        if config.checkpoint.enabled:
            keeper = self._persistence
            engine.carry(keeper.save, keeper.load, keeper.begin_anew)
        self._warn_of_unstable_pull()

    def before_step(self) -> None:
        """What the engine calls before its optimizer step, unless it has been done by hand."""
        if not self._is_handled:
            self.filter_gradients()
        self._is_handled = False

    def filter_gradients(self) -> None:
        """One step: the gradients are averaged and not yet clipped.

        To be called by hand only where a training loop clips by itself: after the backward pass
        and before `clip_grad_norm_`. The hook then leaves this step alone.
        """
        self._warn_of_skipped_steps()
        step = self._step = self.engine.step
        self._is_handled = True
        whole = self.engine.gradients()  # fragments of this rank, writable views
        self._is_used = [gradient is not None for gradient in whole]
        gradients, scale = self._only_filtered(whole), self.engine.loss_scale
        self.monitor.before_step(step, whole, self.engine.weights, scale)
        is_finite = self._others_are_finite(step, whole)
        self.measurement.before_step(self.monitor.is_due(step), self._weights, self.norms)
        for stage in self.stages:
            if stage.is_due(step):
                stage.build()  # a new graph, every refresh_interval
            # Signal and noise, every statistics.interval.
            stage.observe(step, gradients, scale, is_finite)
        if self.regularizer is not None and not self._pulls:
            self.regularizer.add_gradient(gradients, self._weights(), scale)
        if self._updates is not None and self._filters_update(step):
            self._updates.remember(self._filtered_weights())
        else:
            self._apply(step, "gradient", gradients, scale, is_finite)
        if self._edits_gradients(step):
            self.engine.gradients_changed()  # norms that were taken too early

    def after_update(self) -> None:
        """What the engine calls when the base optimizer has moved its most precise weights."""
        step = self._step
        if self._updates is not None and self._filters_update(step):
            with self._updates.of(self._filtered_weights()) as moved:
                updates = iter(moved)
                signal = [next(updates) if chosen else None for chosen in self.is_filtered]
                self._apply(step, "update", self._of_used(signal), 1.0)
        if self.regularizer is not None and self._pulls:
            self.regularizer.pull(self._weights(), self.engine.learning_rates())

    def _apply(
        self,
        step: int,
        what: str,
        signal: Signal,
        scale: float,
        is_finite: torch.Tensor | None = None,
    ) -> None:
        """Y = (1 − s) X + s · h(L) X, measured before and after on monitor steps."""
        self.monitor.before_filter(step, what, signal, scale)
        self.filter.apply(signal, step, scale, is_finite)  # neighbours are exchanged on the way
        if self.monitor.is_due(step):
            is_changed = not self.filter.is_idle(step)
            self.monitor.after_filter(
                what, signal, scale, is_changed, lambda: self.measurement.facts(step)
            )
            self.measurement.show(step, signal, self.monitor, self.dashboard, self.norms)

    def observe_loss(self, loss: torch.Tensor) -> None:
        """Tell the task loss of a micro-batch, for the metric `joint_loss`.

        It does not communicate: any rank may call it alone, any number of times. A monitored step
        averages what all ranks observed since the last. DeepSpeed engines observe by themselves in
        `backward`, so do not observe the same loss again; in other loops call it yourself.
        """
        self.measurement.observe_loss(loss)

    def resumed(self) -> None:
        """What a checkpoint calls that sets the engine to another moment."""
        self._is_handled = False
        self._skipped_steps = self.engine.skipped_steps
        self.monitor.forget()

    def detach(self) -> None:
        """Restore everything that was wrapped; the engine then trains as without the plugin."""
        self.engine.remove()
        self.attached = False
        if self._own_writer is not None:
            self._own_writer.close()

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
        return self.stages[0].graph

    def metrics(self) -> dict[str, float]:
        """Metrics of the last monitored step, equal on all ranks; empty before the first.

        `step`; of all trainable parameters `gradient_norm/all` and `parameter_norm/all`, and from
        the next step on `update_to_weight/all`, ‖θ_new − θ_old‖/‖θ_old‖, of which every 17th
        element tells where a parameter has more than 262,144; the same by block and role as
        `gradient_norm_by_block/b`, `gradient_norm_by_role/r` and so on; `gradient_norm/before` and
        `/after` of the filtered parameters (`update_norm` if updates are filtered);
        `band_energy_before/b` and `band_energy_after/b`, shares of energy in equal bands of
        frequency, lowest first; once two gradients were sampled, `signal_to_noise/b`, `/total` and
        `/kept_over_total`, of (1 − s) + s·h(λ) at the current strength s, and, from consecutive
        samples, `gradient_noise_scale` in examples where both estimates are positive
        (`gradient_noise_scale_in_batches` if the engine does not know its batch size);
        `filter_seconds` of the slowest rank; `boundary_bytes` that all ranks sent in the step;
        `strength`; `skipped_steps` so far; `nodes`; `edges`. With a regularizer: `regularizer`, R;
        `perturbation`, ‖θ − θ_ref‖; and `joint_loss`, task + α · R, where a rank observed the task
        loss. Of several graphs, spectra are measured on the first.
        """
        return dict(self.monitor.metrics)

    def describe(self) -> str:
        """What is attached, for people."""
        parts = []
        for stage in self.stages:
            parts.append(
                f"{stage.graph.describe()}; {stage.plan.describe()}; filter "
                f"{self.config.filter.response} {stage.filter.transfer.describe()}; scratch "
                f"{stage.plan.scratch_bytes / 2**20:.1f} MiB on this rank"
            )
        return (
            "; then ".join(parts)
            + f"; strength {self.config.filter.strength:g} on {self.config.filter.apply_to}s"
        )

    def eigenpairs(self, k: int, graph: int = 0) -> list[Eigenpairs]:
        """The k lowest eigenpairs of every group of joined parameters (collective).

        Args:
            graph: which of several stacked graphs.

        Raises:
            NotConvergedError: the solver did not reach its residual; on all ranks.
            ValueError: k is not an integer >= 1, or there is no such graph.
        """
        stage = self._stage(graph)
        _require_count("k", k)
        is_shown = self.engine.everyone.rank == 0
        with progress("eigenpairs", len(stage.graph.groups), "group", is_shown) as update:
            return lowest_eigenpairs(
                stage.graph,
                k,
                self.engine.communicator,
                seed=self.config.seed,
                progress=update,
            )

    def density(self, bins: int, graph: int = 0) -> Density:
        """Share of the graph's eigenvalues in each of equal bins of [0, λ_max] (collective).

        Args:
            graph: which of several stacked graphs.

        Raises:
            ValueError: bins is not an integer >= 1, or there is no such graph.
        """
        stage = self._stage(graph)
        _require_count("bins", bins)
        return density_of_states(stage.graph, bins, self.engine.communicator, seed=self.config.seed)

    def band_energies(self) -> dict[str, npt.NDArray[np.float64]]:
        """Shares of energy in equal bands of frequency at the last monitored step.

        Returns:
            "before" and "after" the filter: (bands,), float64, lowest first; empty before the
            first monitored step.
        """
        metrics, bands = self.monitor.metrics, range(self.config.monitor.bands)
        return {
            when: np.array([metrics[f"band_energy_{when}/{b}"] for b in bands])
            for when in ("before", "after")
            if f"band_energy_{when}/0" in metrics
        }

    def snr(self, graph: int = 0) -> SignalToNoise:
        """Signal, noise and their ratio per band of frequency, from the samples so far.

        Raises:
            RuntimeError: nothing is sampled: the monitor is off and nothing else needs it.
            ValueError: there is no such graph.
        """
        statistics = self._stage(graph).statistics
        if statistics is None:
            raise RuntimeError(
                "signal and noise are not measured: set spectral_ds.monitor.enabled to true, and "
                "graph.node to row or column"
            )
        return statistics.signal_to_noise()

    def _stage(self, graph: int) -> Stage:
        if graph not in range(len(self.stages)):
            raise ValueError(
                f"graph = {graph!r}: must be the number of one of {len(self.stages)} graphs, from 0"
            )
        return self.stages[graph]

    @property
    def _acts_on_updates(self) -> bool:
        return self.config.filter.apply_to == "update"

    def _filters_update(self, step: int) -> bool:
        """Whether this step's update is filtered, not its gradient."""
        return self._acts_on_updates and not self.filter.is_idle(step)

    @property
    def _pulls(self) -> bool:
        """Whether the regularizer acts on the weights, not on the gradient."""
        return self.regularizer is not None and self.config.regularizer.coupling == "decoupled"

    def _edits_gradients(self, step: int) -> bool:
        adds = self.regularizer is not None and not self._pulls
        return adds or not (self._acts_on_updates or self.filter.is_idle(step))

    def _only_filtered(self, fragments: Signal) -> Signal:
        pairs = zip(fragments, self.is_filtered, strict=True)
        return [fragment if chosen else None for fragment, chosen in pairs]

    def _others_are_finite(self, step: int, whole: Signal) -> torch.Tensor | None:
        """Whether the gradients that are not filtered are finite, on all ranks; (), bool.

        None where nobody asks: it matters to means over steps, since engines skip such a step.
        """
        means = self.filter.temporal is not None and not self._acts_on_updates
        if not (means or any(stage.takes_sample(step) for stage in self.stages)):
            return None
        pairs = zip(whole, self.is_filtered, strict=True)
        others = [gradient for gradient, chosen in pairs if not chosen]
        return squared_norm(others, self.engine.communicator).isfinite()

    def _of_used(self, updates: Signal) -> Signal:
        """Less those of parameters without a gradient, which stay as they are."""
        pairs = zip(updates, self._is_used, strict=True)
        return [update if is_used else None for update, is_used in pairs]

    def _weights(self) -> Signal:
        return self._only_filtered(self.engine.weights())

    def _filtered_weights(self) -> list[torch.Tensor]:
        """The weights of filtered fragments alone."""
        return [weight for weight in self._weights() if weight is not None]

    def _warn_of_skipped_steps(self) -> None:
        skipped = self.engine.skipped_steps
        if skipped > self._skipped_steps:
            self._warn(f"gradients were not finite; the engine has skipped {skipped} steps")
        self._skipped_steps = skipped

    def _warn_of_unstable_pull(self) -> None:
        """θ ← θ − lr · α (r(L) + ρI) Δ overshoots where lr · α (r + ρ) > 1."""
        if self._pulls:
            largest = max(stage.penalty.largest() for stage in self.stages if stage.penalty)
            rate = max([0.0, *self.engine.learning_rates()])
            if (step := rate * self.config.regularizer.strength * largest) > 1:
                self._warn(
                    f"learning rate {rate:g} x regularizer.strength x largest r + ridge = "
                    f"{step:.3g} > 1: the decoupled regularizer overshoots; lower its strength"
                )

    def _warn(self, message: str) -> None:
        self.engine.log(message, logging.WARNING)

    def _agree_on_graphs(self) -> list[GraphChoice]:
        """What each graph is made of; all ranks raise if one cannot go on."""
        engine, config = self.engine, self.config
        models = engine.everyone.gather_objects(list(engine.shapes.items()))
        with engine.everyone.all_or_none():
            for rank, shapes in enumerate(models):
                if shapes != models[0]:
                    raise ValueError(_difference(rank, dict(shapes), dict(models[0])))
            chosen = choose_graphs(engine.shapes, config, head_width_of(engine.holders))
            try:
                require_kernel(config.operator.kernel)
            except KernelUnavailableError as error:
                raise SpectralConfigError(f"spectral_ds.{error}") from error
        return chosen

    def _open_board(self, writer: Any) -> Board:
        """The engine's own monitor, or a writer of the user's or of `monitor.folder`."""
        engine, folder = self.engine, self.config.monitor.folder
        is_first = engine.everyone.rank == 0
        self._own_writer: Any = None
        with engine.everyone.all_or_none():
            if folder and self.config.monitor.enabled and is_first and writer is None:
                from torch.utils.tensorboard import SummaryWriter

                try:
                    writer = self._own_writer = SummaryWriter(folder)
                except OSError as error:
                    raise SpectralConfigError(
                        f"spectral_ds.monitor.folder: cannot write to {folder!r}: {error}"
                    ) from error
        writer = writer if is_first else None
        is_own = engine.everyone.maximum(float(writer is not None)) > 0
        if is_own:

            def write(metrics: Mapping[str, float]) -> None:
                if writer is not None:
                    for name, value in metrics.items():
                        writer.add_scalar(f"spectral_ds/{name}", value, engine.board_step)

            return Board(write, writer, lambda: engine.board_step, is_own)
        writer = engine.summary_writer
        is_open = engine.everyone.maximum(float(writer is not None)) > 0
        if self.config.monitor.enabled and not (is_open or engine.has_monitor):
            engine.log(
                "what is monitored is written nowhere, plugin.metrics() has it; set "
                "spectral_ds.monitor.folder, or switch on the engine's own monitor (DeepSpeed: "
                '"tensorboard": {"enabled": true})'
            )
        return Board(engine.write, writer, lambda: engine.board_step, is_open)

    def _build_regularizer(self) -> Regularizer | None:
        settings = self.config.regularizer
        if settings.strength == 0:
            return None
        weights = self._weights() if settings.reference == "pretrained" else None
        device = torch.device("cpu") if settings.reference_device == "cpu" else None
        return Regularizer(
            lambda: [stage.penalty for stage in self.stages if stage.penalty is not None],
            Reference(weights, device),
            settings.strength,
            self.engine.communicator,
        )

    def _build_filter(self, names: Sequence[str]) -> SpectralFilter:
        settings, communicator = self.config.filter, self.engine.communicator
        number = {name: index for index, name in enumerate(names)}
        norms = temporal = None
        if settings.rescale == "norm":
            # Fragments that are not filtered share a number of their own.
            owners = [number.get(f.parameter, len(names)) for f in self.engine.fragments]
            norms = NormKeeper(owners, len(names) + 1, communicator)
        if settings.temporal is not None:
            lengths = [
                fragment.length if chosen else 0
                for fragment, chosen in zip(self.engine.fragments, self.is_filtered, strict=True)
            ]
            temporal = TemporalFilter(
                lengths,
                communicator,
                decay=settings.temporal.decay,
                amplify=settings.temporal.amplify,
            )
        schedule = StrengthSchedule(
            settings.strength, settings.warmup_steps, settings.decay_steps, settings.interval
        )
        return SpectralFilter(
            lambda: [stage.filter for stage in self.stages], schedule, norms, temporal
        )


def _require_count(name: str, value: object) -> None:
    if not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"{name} = {value!r}: must be an integer >= 1")


def _difference(
    rank: int, shapes: Mapping[str, tuple[int, ...]], first: Mapping[str, tuple[int, ...]]
) -> str:
    """How the trainable parameters of a rank differ from those of rank 0."""
    for name in (*first, *shapes):
        if first.get(name) != shapes.get(name):
            return (
                f"ranks train different models: parameter {name!r} has shape {first.get(name)} "
                f"on rank 0 and {shapes.get(name)} on rank {rank}"
            )
    return f"ranks train different models: parameters are in another order on rank {rank}"
