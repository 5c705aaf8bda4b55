"""Engine: what the rest of the package needs to know of a training engine.

Gradients, weights and hooks; what only some engines can do besides is in `capabilities`.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from spectral_ds.console.messages import logger
from spectral_ds.engines.capabilities import DistributedTensors, EngineCheckpoints, EngineMonitor
from spectral_ds.engines.newcomers import Admission
from spectral_ds.sharding import Communicator, Fragment

# What torch.compile and activation checkpointing put into parameter names.
WRAPPER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.")


class UnsupportedEngineError(RuntimeError):
    """The engine, or a feature of it that is in use, is not supported."""


class NothingToFilterError(UnsupportedEngineError):
    """The engine trains nothing."""


class Engine(ABC):
    """An engine's gradients and weights, seen as fragments.

    Attributes:
        communicator: the ranks over which parameters are sharded; this rank alone where every
            rank holds them whole.
        everyone: all ranks that train together, replicas included.
        shapes: full shape of each trainable parameter by canonical name, in model order; equal on
            all ranks.
        named: the model's parameters by canonical name; those of `shapes` are among them.
        fragments: what this rank owns; fixed until `admit`. `gradients`, `weights` and
            `learning_rates` follow this order.
        holders: the user's objects by which the plugin can be found again.
        module: the model itself, neither compiled nor in a wrapper of the engine's.
        optimizer: that moves the weights.
        calls_copies: whether copies of the module are called in its place, in threads.
        takes_newcomers: whether frozen parameters can come to be trained.
        monitor: the engine's own monitor; None if it has none or it is off, on all ranks alike.
        checkpoints: the engine's own checkpoints; None if it makes none.
        tensors: how `torch.distributed.checkpoint` sees the shards; None if it cannot.
    """

    communicator: Communicator
    everyone: Communicator
    shapes: Mapping[str, tuple[int, ...]]
    named: Mapping[str, torch.nn.Parameter]
    fragments: Sequence[Fragment]
    holders: Sequence[object]
    module: torch.nn.Module
    optimizer: object
    calls_copies: bool = False
    takes_newcomers: bool = True
    monitor: EngineMonitor | None = None
    checkpoints: EngineCheckpoints | None = None
    tensors: DistributedTensors | None = None

    @property
    @abstractmethod
    def config_section(self) -> Any:
        """The "spectral_ds" section of the engine's own config; None if it has none."""

    @property
    @abstractmethod
    def step(self) -> int:
        """Optimizer steps taken so far."""

    @property
    def skipped_steps(self) -> int:
        """Steps that the engine itself has skipped so far because of non-finite gradients."""
        return 0

    @property
    def evaluations(self) -> int:
        """How often gradients were there before in the step that is running, which has a closure.

        0 between steps, and where steps have none.
        """
        return 0

    @property
    def climbs(self) -> int:
        """Gradients so far by which an optimizer of two half-steps has only climbed."""
        return 0

    @property
    def loss_scale(self) -> float:
        """What the gradients are multiplied by in `before_step`."""
        return 1.0

    @abstractmethod
    def learning_rates(self) -> list[float]:
        """The current learning rate of each fragment's parameter group, 0 where it is frozen.

        Raises:
            UnsupportedEngineError: a group has none, as the optimizer finds its own.
        """

    @abstractmethod
    def gradients(self) -> list[torch.Tensor | None]:
        """Averaged gradients as flat writable views, valid inside `before_step` only.

        None for a parameter that got no gradient in this step.
        """

    def sparse_gradients(self) -> frozenset[str]:
        """Names of the parameters whose gradients are sparse in this step; `gradients` has None."""
        return frozenset()

    @abstractmethod
    def weights(self) -> list[torch.Tensor]:
        """Weights as flat writable views, in the highest precision that the engine keeps.

        What is written to them inside `after_update` ends up in the model's parameters.
        """

    def gradients_changed(self) -> None:  # noqa: B027 - most engines have nothing to do
        """Bring up to date what the engine derived from the gradients before they were edited."""

    @abstractmethod
    def install(
        self,
        before_step: Callable[[], None],
        after_update: Callable[[], None] | None = None,
        begin_step: Callable[[], None] | None = None,
    ) -> None:
        """Call the hooks at each optimizer step, on all ranks alike.

        Args:
            before_step: called after the gradients are averaged over ranks and accumulation, and
                before the engine's own overflow check, norm and clipping. Where a step evaluates a
                closure, called after each evaluation; `evaluations` tells them apart.
            after_update: called when the base optimizer has updated all `weights`, before low
                precision copies are made of them and before ranks gather each other's; not on a
                step that the engine skips.
            begin_step: called before `before_step`, once, when the step has moved no weight yet;
                given if it is updates that are filtered.

        Raises:
            UnsupportedEngineError: the engine gives no place to call `after_update` from.
        """

    def watch_loss(self, observe: Callable[[torch.Tensor], None]) -> None:  # noqa: B027
        """Call `observe` with the task loss of each micro-batch, if the engine gets to see it."""

    def watch_others(self) -> None:  # noqa: B027
        """Warn, once for each, of other optimizers that step the same parameters by themselves."""

    def restore_step(self, step: int) -> None:  # noqa: B027
        """Go on counting steps from here, if the plugin may set `step`; else `step` stays."""

    @abstractmethod
    def remove(self) -> None:
        """Take back every hook: `install`, `watch_loss` and `checkpoints.carry`."""

    @abstractmethod
    def newcomers(self) -> Sequence[torch.Tensor]:
        """Parameters that the next step may change, and that were never looked at.

        To be asked at each step: it reads no tensor and does not communicate.
        """

    @abstractmethod
    def admit(self, newcomers: Sequence[torch.Tensor]) -> Admission:
        """Look at what `newcomers` gave: take it into `shapes` and `fragments`, or leave it out.

        No communication: the same parameters come on all ranks.
        """

    @property
    def is_complete(self) -> bool:
        """Whether all ranks of `everyone` take the present step, so that they may communicate.

        Ranks of `communicator` may in any case.
        """
        return True

    def when_complete(self, function: Callable[[], None]) -> None:  # noqa: B027
        """Call the function on all ranks each time those are back that had left.

        It may communicate. Called after `install`; until `remove`.
        """

    def log(self, message: str, level: int = logging.INFO) -> None:
        """Say something once, on rank 0."""
        if self.everyone.rank == 0:
            logger.log(level, message)

    @property
    def batch_size(self) -> int | None:
        """Examples that one optimizer step averages over; None if the engine does not know."""
        return None

    @property
    def board_step(self) -> int:
        """The number under which the engine's monitor files what is written now."""
        return self.step


def learning_rate_of(group: Mapping[str, Any]) -> float:
    """The learning rate of a torch optimizer's parameter group; a tensor on a device is waited for.

    Raises:
        UnsupportedEngineError: the group has none.
    """
    if group["lr"] is None:
        raise UnsupportedEngineError(
            "the optimizer has no learning rate (lr is None), by which coupling: decoupled "
            "multiplies; set one, or use coupling: joint"
        )
    return float(group["lr"])


def canonical_name(name: str) -> str:
    """A parameter's name without what torch.compile and activation checkpointing add."""
    for prefix in WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name
