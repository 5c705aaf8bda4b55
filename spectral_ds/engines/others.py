"""Other optimizers that step what a plugin is attached to: their gradients are not filtered."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from spectral_ds.engines.steps import not_compiled, running_steps


class OtherOptimizers:
    """Watches the steps of all optimizers, until `remove`.

    One that is stepped inside another, as by a wrapper, is not alone: the other's own step counts.

    Args:
        own: the optimizer that the plugin is attached to; kept alive by others.
        parameters: gives what it is attached for.
        steps: gives how often it has stepped.
        tell: called once with each other optimizer that stepped some of them by itself.
    """

    def __init__(
        self,
        own: torch.optim.Optimizer,
        parameters: Callable[[], Iterable[torch.Tensor]],
        steps: Callable[[], int],
        tell: Callable[[torch.optim.Optimizer], None],
    ) -> None:
        self._own, self._parameters = weakref.ref(own), parameters
        self._steps, self._tell = steps, tell
        self._steps_before: dict[int, int] = {}  # by id of an optimizer that is stepping
        self._told: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        # Not to keep a plugin alive from a hook that lives as long as the process.
        this = weakref.ref(self)

        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if (watch := this()) is not None:
                watch._before(optimizer)

        def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if (watch := this()) is not None:
                watch._after(optimizer)

        self._handles = [
            register_optimizer_step_pre_hook(not_compiled(before)),
            register_optimizer_step_post_hook(not_compiled(after)),
        ]
        for handle in self._handles:
            weakref.finalize(self, handle.remove)

    def _before(self, optimizer: torch.optim.Optimizer) -> None:
        own = self._own()
        if optimizer is own or optimizer in self._told:
            return
        if all(each is not own for each in running_steps()):
            self._steps_before[id(optimizer)] = self._steps()

    def _after(self, optimizer: torch.optim.Optimizer) -> None:
        if self._steps_before.pop(id(optimizer), None) == self._steps():
            own = {id(parameter) for parameter in self._parameters()}
            if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
                self._told.add(optimizer)
                self._tell(optimizer)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
