"""Engine: what the rest of the package needs to know of a training engine.

A new engine is one new file: a subclass that yields fragments and calls a hook before each
optimizer step and one after each update.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from spectral_ds.sharding import Communicator, Fragment


class UnsupportedEngineError(RuntimeError):
    """The engine, or a feature of it that is in use, is not supported."""


class Engine(ABC):
    """An engine's gradients and weights, seen as fragments.

    Attributes:
        communicator: the ranks over which parameters are sharded; this rank alone where every
            rank holds them whole.
        everyone: all ranks that train together, replicas included.
        shapes: full shape of each trainable parameter by name, in model order; equal on all
            ranks.
        fragments: what this rank owns; fixed. `gradients`, `weights` and `learning_rates` follow
            this order.
        holders: the user's objects by which the plugin can be found again.
    """

    communicator: Communicator
    everyone: Communicator
    shapes: Mapping[str, tuple[int, ...]]
    fragments: Sequence[Fragment]
    holders: Sequence[object]

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
    def loss_scale(self) -> float:
        """What the gradients are multiplied by in `before_step`."""
        return 1.0

    @abstractmethod
    def learning_rates(self) -> list[float]:
        """The current learning rate of each fragment's parameter group."""

    @abstractmethod
    def gradients(self) -> list[torch.Tensor | None]:
        """Averaged gradients as flat writable views, valid inside `before_step` only.

        None for a parameter that got no gradient in this step.
        """

    @abstractmethod
    def weights(self) -> list[torch.Tensor]:
        """Weights as flat writable views, in the highest precision that the engine keeps.

        What is written to them inside `after_update` ends up in the model's parameters.
        """

    def gradients_changed(self) -> None:  # noqa: B027 - most engines have nothing to do
        """Bring up to date what the engine derived from the gradients before they were edited."""

    @abstractmethod
    def install(
        self, before_step: Callable[[], None], after_update: Callable[[], None] | None = None
    ) -> None:
        """Call the hooks at each optimizer step, on all ranks alike.

        Args:
            before_step: called after the gradients are averaged over ranks and accumulation, and
                before the engine's own overflow check, norm and clipping.
            after_update: called when the base optimizer has updated all `weights`, before low
                precision copies are made of them and before ranks gather each other's; not on a
                step that the engine skips.

        Raises:
            UnsupportedEngineError: the engine gives no place to call `after_update` from.
        """

    @abstractmethod
    def remove(self) -> None:
        """Undo `install`."""

    @abstractmethod
    def log(self, message: str, level: int = logging.INFO) -> None:
        """Say something once, on rank 0, through the engine's own logger."""

    @abstractmethod
    def write(self, metrics: Mapping[str, float]) -> None:
        """Write scalars to the engine's own monitor (rank 0 writes; others do nothing)."""
