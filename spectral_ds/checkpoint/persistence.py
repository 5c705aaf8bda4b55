"""Persistence: the plugin's state with the engine's own checkpoints.

DeepSpeed's `save_checkpoint` and `load_checkpoint` carry it by themselves; for other engines the
plugin has `state_dict` and `load_state_dict`.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spectral_ds.checkpoint import (
    CheckpointError,
    Pieces,
    PluginState,
    SavedState,
    difference_of_graphs,
    from_tensors,
    read_state,
    to_tensors,
    write_state,
)
from spectral_ds.engines import UnsupportedEngineError
from spectral_ds.engines.capabilities import DistributedTensors

if TYPE_CHECKING:
    from spectral_ds.plugin import SpectralPlugin

REFERENCE, TEMPORAL = "reference", "temporal"


class Persistence:
    """Collects and restores the state of one plugin."""

    def __init__(self, plugin: "SpectralPlugin") -> None:
        self._plugin = plugin
        self._engine = plugin.engine

    def state(self) -> PluginState:
        """The state as this rank holds it (collective)."""
        plugin, engine = self._plugin, self._engine
        shapes = {name: tuple(shape) for name, shape in engine.shapes.items()}
        state = PluginState(shapes, self._graphs())
        state.numbers["step"] = torch.tensor([float(engine.step)], dtype=torch.float64)
        for index, stage in enumerate(plugin.stages):
            state.edges.append(stage.graph.primary_edges())
            is_ready = torch.tensor([float(stage.filter.is_ready)], dtype=torch.float64)
            state.numbers[f"graph.{index}.is_ready"] = is_ready
            statistics = stage.statistics
            if statistics is not None:
                for name, number in statistics.numbers().items():
                    state.numbers[f"statistics.{index}.{name}"] = number
            for kind, running in stage.running.items():
                for name, number in running.numbers().items():
                    state.numbers[f"{kind}.{index}.{name}"] = number
                own = running.sketches.layout.own
                state.pieces[f"{kind}.{index}"] = Pieces(own, list(running.complete()))
        temporal = plugin.filter.temporal
        if temporal is not None:
            state.numbers["temporal.has_mean"] = self._by_parameter(temporal.has_mean)
            state.pieces[TEMPORAL] = self._of_filtered(temporal.means)
        if plugin.regularizer is not None and plugin.regularizer.reference.fragments is not None:
            state.pieces[REFERENCE] = self._of_filtered(plugin.regularizer.reference.fragments)
        return state

    def _graphs(self) -> list[str]:
        """A digest of the configuration of each graph."""
        config = self._plugin.config
        return [_digest({**asdict(graph), "seed": config.seed}) for graph in config.stack]

    def _of_filtered(self, values: Sequence[torch.Tensor | None]) -> Pieces:
        filtered = self._plugin.is_filtered
        chosen = [
            (fragment, value)
            for fragment, value, is_in in zip(self._engine.fragments, values, filtered, strict=True)
            if is_in
        ]
        return Pieces([fragment for fragment, _ in chosen], [value for _, value in chosen])

    def _by_parameter(self, flags: torch.Tensor) -> torch.Tensor:
        """A flag a fragment as a number a parameter, equal on all ranks."""
        position = {name: i for i, name in enumerate(self._engine.shapes)}
        found = torch.zeros(len(position), dtype=torch.float64)
        for fragment, flag in zip(self._engine.fragments, flags.tolist(), strict=True):
            found[position[fragment.parameter]] += flag
        communicator = self._engine.communicator
        return communicator.sum_(found.to(communicator.device)).sign().cpu()

    def restore(self, saved: SavedState, engine_step: int | None = None) -> None:
        """Go on from a state (collective). All ranks raise before anything is changed, or none.

        Of a state of other graphs, unless `checkpoint.strict`, all is used that depends on none.

        Args:
            engine_step: that the state must be of; None: the engine is set to the state's step.

        Raises:
            CheckpointError: a part that the configuration needs is missing, the state is of another
                step, or, if strict, of other graphs.
        """
        plugin, engine = self._plugin, self._engine
        with engine.everyone.all_or_none():
            difference = self._other_graphs(saved)
        stages = [] if difference else plugin.stages
        own = self._of_filtered([None] * len(plugin.is_filtered)).fragments
        temporal, regularizer = plugin.filter.temporal, plugin.regularizer
        means = references = None
        sketches: list[dict[str, list[torch.Tensor]]] = []
        with engine.everyone.all_or_none():
            step = int(saved.number("step"))
            is_ready = [saved.number(f"graph.{index}.is_ready") > 0 for index in range(len(stages))]
            if engine_step not in (None, step):
                raise CheckpointError(
                    f"the plugin's state is of step {step}, but the engine's own part of the "
                    f"checkpoint is of step {engine_step}: saving was cut off between the two, or "
                    "one of them was replaced"
                )
            if temporal is not None and "temporal.has_mean" in saved.numbers:
                means = saved.pieces(TEMPORAL, own)
            if regularizer is not None and regularizer.reference.fragments is not None:
                references = saved.pieces(REFERENCE, own)
            for index, stage in enumerate(stages):
                found = {}
                for kind, running in stage.running.items():
                    if running.fits(_of(f"{kind}.{index}", saved.numbers)):
                        found[kind] = saved.pieces(f"{kind}.{index}", running.sketches.layout.own)
                sketches.append(found)
        for index, (stage, found) in enumerate(zip(stages, sketches, strict=True)):
            for kind, complete in found.items():
                stage.running[kind].restore(_of(f"{kind}.{index}", saved.numbers), complete)
            if stage.statistics is not None and "sketch" in found:
                stage.statistics.restore(_of(f"statistics.{index}", saved.numbers))
            stage.restore(saved.edges[index], is_ready[index])
        if temporal is not None and means is not None:
            self._fill(temporal.means, means)
            position = {name: i for i, name in enumerate(engine.shapes)}
            has_mean = saved.numbers["temporal.has_mean"].tolist()
            flags = [has_mean[position[f.parameter]] > 0 for f in engine.fragments]
            temporal.has_mean = torch.tensor(flags, device=temporal.has_mean.device)
        if regularizer is not None and references is not None:
            assert regularizer.reference.fragments is not None
            self._fill(regularizer.reference.fragments, references)
        if difference:
            self._build_anew()
            self._warn(
                f"{difference}; checkpoint.strict is false: it goes on with a new graph, and with "
                "step, reference and running mean of the saved state"
            )
        engine.restore_step(step)
        if engine.step != step:
            self._warn(
                f"the plugin's state is of step {step}, but the engine is at step {engine.step} "
                "and counts by itself; schedules and intervals go by the engine"
            )

    def _other_graphs(self, saved: SavedState) -> str:
        """How the saved graphs are others; empty if they are not.

        Raises:
            CheckpointError: they are, and `checkpoint.strict` is true.
        """
        difference = difference_of_graphs(saved.graphs, self._graphs())
        if not difference:
            return ""
        difference = (
            f"{saved.where} is of another graph configuration (spectral_ds.graph, graphs or seed): "
            f"{difference}"
        )
        if self._plugin.config.checkpoint.strict:
            raise CheckpointError(
                f"{difference}; restore it, or set spectral_ds.checkpoint.strict to false to start "
                "with a new graph"
            )
        return difference

    def _fill(self, targets: Sequence[torch.Tensor | None], values: Sequence[torch.Tensor]) -> None:
        incoming = iter(values)
        for target, is_in in zip(targets, self._plugin.is_filtered, strict=True):
            if is_in:
                value = next(incoming)
                if target is not None:
                    target.copy_(value)

    def save(self, folder: Path) -> None:
        """Write the state into a folder that all ranks see (collective)."""
        engine = self._engine
        write_state(folder, self.state(), engine.communicator.rank, engine.everyone)

    def load(self, folder: Path, is_expected: bool = True, engine_step: int | None = None) -> None:
        """Go on from a folder that `save` wrote, at any world size (collective).

        Args:
            is_expected: whether the checkpoint was made with the plugin; if not, the folder is
                not read: an older run may have left it.
            engine_step: that the engine has restored from the same checkpoint; None: there is none.

        Raises:
            CheckpointError: what is there cannot be used, and `checkpoint.strict` is true.
        """
        if not is_expected:
            self._build_anew()
            self._plugin.resumed()
            self._engine.log(
                "the checkpoint was made without the plugin; it goes on with the "
                "graph of the present weights, and with the reference of before"
            )
            return
        self._go_on(lambda: read_state(folder, self.state(), self._engine.everyone), engine_step)

    def begin_anew(self) -> None:
        """Begin a new training from weights that were loaded alone (collective).

        They are the reference now, and the graph is made of them.
        """
        regularizer = self._plugin.regularizer
        if regularizer is not None and regularizer.reference.fragments is not None:
            weights = self._of_filtered(self._engine.weights()).values
            self._fill(regularizer.reference.fragments, [w for w in weights if w is not None])
        self._build_anew()
        self._plugin.resumed()
        self._engine.log(
            "weights were loaded alone; the graph is made of them, and they are the reference"
        )

    def _go_on(self, read: Callable[[], SavedState], engine_step: int | None = None) -> None:
        """Go on from what `read` gives; with nothing of it if it cannot be used, unless strict."""
        try:
            self.restore(read(), engine_step)
        except CheckpointError as error:
            if self._plugin.config.checkpoint.strict:
                raise
            self._build_anew()
            self._warn(
                f"{error}; checkpoint.strict is false: it goes on with a new graph, and with "
                "nothing of the saved state"
            )
        self._plugin.resumed()

    def _build_anew(self) -> None:
        """Graphs of what the model is now (collective)."""
        for stage in self._plugin.stages:
            stage.build()

    def _warn(self, message: str) -> None:
        self._engine.log(message, logging.WARNING)

    def tensors(self) -> dict[str, Any]:
        """The state for `torch.distributed.checkpoint` (collective).

        Raises:
            UnsupportedEngineError: the engine has checkpoints of its own.
        """
        shards = self._shards()
        capacity = [stage.most_edges() for stage in self._plugin.stages]
        whole = {
            f"{kind}.{index}": {
                parameter.name: parameter.nodes * running.sketches.columns[parameter.name]
                for parameter in stage.parameters
                if parameter.name in running.sketches.columns
            }
            for index, stage in enumerate(self._plugin.stages)
            for kind, running in stage.running.items()
        }
        return to_tensors(
            self.state(),
            capacity,
            whole,
            shards.wrap,
            shards.local_part,
            self._engine.communicator,
        )

    def use_tensors(self, tensors: dict[str, Any]) -> None:
        """Go on from what `tensors` gave (collective).

        Raises:
            CheckpointError: it cannot be used, and `checkpoint.strict` is true.
            UnsupportedEngineError: the engine has checkpoints of its own.
        """
        engine, shards = self._engine, self._shards()
        self._go_on(
            lambda: from_tensors(
                tensors, shards.local_part, self.state(), engine.everyone, engine.communicator
            )
        )

    def _shards(self) -> DistributedTensors:
        if self._engine.tensors is None:
            raise UnsupportedEngineError(
                "this engine's own checkpoints carry the plugin's state; state_dict() is for "
                "FSDP2, DDP and plain modules"
            )
        return self._engine.tensors


def _of(prefix: str, numbers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Numbers below a prefix, by the rest of their names."""
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in numbers.items() if n.startswith(start)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
