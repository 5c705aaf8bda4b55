"""Persistence: the parts' states, together, in the engine's own checkpoints or by hand.

DeepSpeed's `save_checkpoint` and `load_checkpoint` carry them by themselves; for other engines the
plugin has `state_dict` and `load_state_dict`.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from spectral_ds.checkpoint.distributed import from_tensors, to_tensors
from spectral_ds.checkpoint.folder import read_state, write_state
from spectral_ds.checkpoint.state import (
    CheckpointError,
    Part,
    PluginState,
    SavedState,
    StatefulStack,
    difference_of_graphs,
)
from spectral_ds.engines import Engine, UnsupportedEngineError
from spectral_ds.engines.capabilities import DistributedTensors


class Persistence:
    """Collects and restores the state of one plugin.

    Args:
        engine: counts the steps, and may carry the state in checkpoints of its own.
        stack: the parts that have state.
        is_strict: whether a state that cannot be used is an error; if not, new graphs are made.
        resumed: called when the plugin has gone on from another moment.
    """

    def __init__(
        self, engine: Engine, stack: StatefulStack, is_strict: bool, resumed: Callable[[], None]
    ) -> None:
        self._engine, self._stack = engine, stack
        self._is_strict, self._resumed = is_strict, resumed
        # Goes on from a state of parameters that are not trained yet; None: none is waiting.
        self._waiting: Callable[[], None] | None = None

    def use(self, stack: StatefulStack) -> None:
        """Collect and restore the state of another stack from now on."""
        self._stack = stack

    def begin_step(self) -> None:
        """Go on from a state that waits for the parameters of this step (collective if so).

        Raises:
            CheckpointError: some are still not trained, and that is an error.
        """
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting()

    def level(self) -> None:
        """Give every rank the state of the one that took most steps (collective).

        Ranks that hold the same parameters whole differ in it where some have left early.
        """
        everyone = self._engine.everyone
        steps = everyone.gather_objects(self._engine.step)
        if len(set(steps)) == 1:
            return
        tensors = self.tensors()
        for name in sorted(tensors):
            if everyone.rank != steps.index(max(steps)):
                tensors[name].zero_()
            tensors[name].copy_(everyone.sum_(tensors[name].to(everyone.device)))
        self.use_tensors(tensors)

    def carry(self) -> None:
        """Have the engine's own checkpoints carry the state, if it makes any."""
        if self._engine.checkpoints is not None:
            self._engine.checkpoints.carry(self.save, self.load, self.begin_anew)

    def state(self) -> PluginState:
        """The state as this rank holds it (collective)."""
        engine, stack = self._engine, self._stack
        shapes = {name: tuple(shape) for name, shape in engine.shapes.items()}
        state = PluginState(shapes, [graph.digest for graph in stack.graphs])
        state.numbers["step"] = torch.tensor(
            [float(engine.step)], dtype=torch.float64, device="cpu"
        )
        for part in (*stack.graphs, *stack.memories):
            state.add(part.state())
        return state

    def restore(self, saved: SavedState, engine_step: int | None = None) -> None:
        """Go on from a state (collective). All ranks raise before anything is changed, or none.

        From a state of other graphs, unless strict, all is used that depends on no graph.

        Args:
            engine_step: that the state must be of; None: the engine is set to the state's step.

        Raises:
            CheckpointError: something that a part needs is missing, the state is of another step,
                or, if strict, of other graphs.
        """
        engine, stack = self._engine, self._stack
        with engine.everyone.all_or_none():
            if saved.untrained:
                raise CheckpointError(
                    f"{saved.where} is of parameters that are not trained here: "
                    f"{_listed(saved.untrained)}: unfreeze them before attaching"
                )
            difference = self._other_graphs(saved)
        parts: Sequence[Part] = [*(() if difference else stack.graphs), *stack.memories]
        with engine.everyone.all_or_none():
            step = int(saved.number("step"))
            if engine_step not in (None, step):
                raise CheckpointError(
                    f"the plugin's state is of step {step}, but the engine's own part of the "
                    f"checkpoint is of step {engine_step}: saving was cut off between the two, or "
                    "one of them was replaced"
                )
            restorations = [part.restore(saved) for part in parts]
        for put_in_place in restorations:
            put_in_place()
        if difference:
            stack.rebuild()
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
            CheckpointError: they are, and a state that cannot be used is an error.
        """
        here = [graph.digest for graph in self._stack.graphs]
        difference = difference_of_graphs(saved.graphs, here)
        if not difference:
            return ""
        difference = (
            f"{saved.where} is of another graph configuration (spectral_ds.graph, graphs or seed): "
            f"{difference}"
        )
        if changed := [c for graph in self._stack.graphs if (c := graph.changed_inputs(saved))]:
            difference = f"{difference}: {'; '.join(changed)}"
        if self._is_strict:
            raise CheckpointError(
                f"{difference}; restore it, or set spectral_ds.checkpoint.strict to false to start "
                "with a new graph"
            )
        return difference

    def save(self, folder: Path) -> None:
        """Write the state into a folder that all ranks see (collective)."""
        engine = self._engine
        self._refuse_to_wait()
        write_state(folder, self.state(), engine.communicator.rank, engine.everyone)

    def load(self, folder: Path, is_expected: bool = True, engine_step: int | None = None) -> None:
        """Go on from a folder that `save` wrote, at any world size (collective).

        Args:
            is_expected: whether the checkpoint was made with the plugin; if not, the folder is
                not read: an older run may have left it.
            engine_step: that the engine has restored from the same checkpoint; None: there is none.

        Raises:
            CheckpointError: what is there cannot be used, and that is an error.
        """
        self._waiting = None
        if not is_expected:
            self._stack.rebuild()
            self._resumed()
            self._engine.log(
                "the checkpoint was made without the plugin; it goes on with the "
                "graph of the present weights, and with the reference of before"
            )
            return
        engine = self._engine

        def read() -> SavedState:
            frozen = engine.named.keys() - engine.shapes.keys()
            untrained = frozen if engine.takes_newcomers else ()
            return read_state(folder, self.state(), engine.everyone, untrained)

        self._go_on(read, engine_step, may_wait=True)

    def begin_anew(self) -> None:
        """Begin a new training from weights that were loaded alone (collective)."""
        self._waiting = None
        self._stack.begin_anew()
        self._resumed()
        self._engine.log(
            "weights were loaded alone; the graph is made of them, and they are the reference"
        )

    def tensors(self) -> dict[str, Any]:
        """The state for `torch.distributed.checkpoint` (collective).

        Raises:
            UnsupportedEngineError: the engine has checkpoints of its own.
        """
        self._refuse_to_wait()
        shards, graphs = self._shards(), self._stack.graphs
        return to_tensors(
            self.state(),
            [graph.most_edges() for graph in graphs],
            {name: sizes for graph in graphs for name, sizes in graph.whole_pieces().items()},
            shards.wrap,
            shards.local_part,
            self._engine.communicator,
        )

    def use_tensors(self, tensors: dict[str, Any]) -> None:
        """Go on from what `tensors` gave (collective).

        Raises:
            CheckpointError: it cannot be used, and that is an error.
            UnsupportedEngineError: the engine has checkpoints of its own.
        """
        engine, shards = self._engine, self._shards()
        self._waiting = None
        self._go_on(
            lambda: from_tensors(
                tensors, shards.local_part, self.state(), engine.everyone, engine.communicator
            )
        )

    def _go_on(
        self,
        read: Callable[[], SavedState],
        engine_step: int | None = None,
        may_wait: bool = False,
    ) -> None:
        """Go on from what `read` gives; with nothing of it if it cannot be used, unless strict.

        Args:
            may_wait: whether parameters that are not trained yet may come with the next step.
        """
        engine = self._engine
        try:
            saved = read()
            if saved.untrained and may_wait:
                self._waiting = lambda: self._go_on(read, engine_step)
                engine.restore_step(int(saved.number("step")))
                engine.log(
                    f"{saved.where} is loaded at the next step, as it is of parameters that are "
                    f"not trained yet: {_listed(saved.untrained)}"
                )
            else:
                self.restore(saved, engine_step)
        except CheckpointError as error:
            if self._is_strict:
                raise
            self._stack.rebuild()
            self._warn(
                f"{error}; checkpoint.strict is false: it goes on with a new graph, and with "
                "nothing of the saved state"
            )
        self._resumed()

    def _refuse_to_wait(self) -> None:
        if self._waiting is not None:
            raise CheckpointError(
                "the loaded state waits for parameters that the next step trains: save after it"
            )

    def _shards(self) -> DistributedTensors:
        if self._engine.tensors is None:
            raise UnsupportedEngineError(
                "this engine's own checkpoints carry the plugin's state; state_dict() is for "
                "FSDP2, DDP and plain modules"
            )
        return self._engine.tensors

    def _warn(self, message: str) -> None:
        self._engine.log(message, logging.WARNING)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]!r}{more}"
