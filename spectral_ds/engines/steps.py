"""The steps of a torch optimizer: a call of `step` from outside, with all that it calls inside.

torch runs an optimizer's hooks in every `step` that some class defines, so also in the
`super().step()` of a subclass, and leaves out the hook after it if the step raised. Here a step is
the outermost call, told by the frames that are running, and nothing has to be counted. Where a
step is given a closure, gradients are there after each evaluation of it.
"""

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch

from spectral_ds.engines.base import UnsupportedEngineError
from spectral_ds.engines.wrappers import parameters_of

# Every `step` runs inside a frame of this code, which calls the hooks.
_STEP = torch.optim.Optimizer.profile_hook_step(lambda self: None).__code__

IN_BACKWARD = (
    "its step runs inside the backward pass, when other parameters have no gradient yet and those "
    "of earlier ones may be gone; step one optimizer of all parameters after backward"
)


def running_steps() -> list[torch.optim.Optimizer]:
    """The optimizers in whose `step` the caller runs, innermost first, once for each call."""
    found = []
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _STEP:
            found.append(frame.f_locals["self"])
        frame = frame.f_back  # type: ignore[assignment]
    return found


def is_nested(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the hook that asks belongs to a `step` called by another `step` of the optimizer."""
    return sum(each is optimizer for each in running_steps()) > 1


def is_in_backward() -> bool:
    """Whether a backward pass is running in this thread; False where torch does not tell."""
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and current() != -1


def not_compiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, which torch.compile of a step leaves as it is."""
    untraced: Callable[..., Any] = torch.compiler.disable(hook)
    return untraced


def version_of(tensor: Any) -> int:
    """Changes with every operation in place: a backward pass that adds to it, zeroing, clipping."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local._version)


class GradientMarks:
    """An optimizer's gradients as they are now; keeps none of them alive."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._marks = [
            None if p.grad is None else (weakref.ref(p.grad), version_of(p.grad))
            for p in parameters_of(optimizer)
        ]

    def are_current(self) -> bool:
        """Whether no gradient has come, gone or changed since."""
        gradients = [p.grad for p in parameters_of(self._optimizer)]
        return len(gradients) == len(self._marks) and all(
            gradient is None
            if mark is None
            else mark[0]() is gradient and mark[1] == version_of(gradient)
            for mark, gradient in zip(self._marks, gradients, strict=True)
        )


class StepCalls:
    """Calls hooks at each step of a torch optimizer, until `remove`.

    Args:
        optimizer: its step may call its closure any number of times, and other steps of its own.
        begin: called when a step begins, before it moves anything.
        ready: called when gradients are there: once if the step has no closure, as it begins; else
            after the first evaluation, and after each later one that changed a gradient.
        end: called when a step has ended without an error.
        warn: says something to the user.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        begin: Callable[[], None],
        ready: Callable[[], None],
        end: Callable[[], None],
        warn: Callable[[str], None],
    ) -> None:
        self._optimizer = optimizer
        self._begin, self._ready, self._end, self._warn = begin, ready, end, warn
        self._evaluations = 0
        self._has_begun = self._has_warned = False
        self._handles = [
            optimizer.register_step_pre_hook(not_compiled(self._before)),
            optimizer.register_step_post_hook(not_compiled(self._after)),
        ]

    @property
    def evaluations(self) -> int:
        """How often `ready` was called before in the step that is running; 0 if none is."""
        is_running = self._evaluations > 0 and any(s is self._optimizer for s in running_steps())
        return self._evaluations if is_running else 0

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        if is_in_backward():
            raise UnsupportedEngineError(f"{type(optimizer).__name__}: {IN_BACKWARD}")
        if not is_nested(optimizer):
            self._has_begun, self._evaluations = True, 0
            self._begin()
        closure, by_name = kwargs.get("closure"), True
        if closure is None and len(args) > 1:
            closure, by_name = args[1], False
        if not callable(closure):
            if self._evaluations == 0:
                self._call_ready()
            return None
        watched = self._watched(closure)
        if by_name:
            return args, {**kwargs, "closure": watched}
        return (args[0], watched, *args[2:]), kwargs

    def _watched(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(closure)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            evaluations, marks = self._evaluations, GradientMarks(self._optimizer)
            loss = closure(*args, **kwargs)
            # One that was passed on by a step inside this one has told it already.
            is_told = self._evaluations > evaluations
            if not is_told and (evaluations == 0 or not marks.are_current()):
                self._call_ready()
            return loss

        return evaluate

    def _call_ready(self) -> None:
        with torch.no_grad():
            self._ready()
        self._evaluations += 1

    def _after(self, optimizer: Any, *_: Any) -> None:
        if is_nested(optimizer) or not self._has_begun:
            return
        if self._evaluations == 0 and not self._has_warned:
            self._has_warned = True
            self._warn(
                f"{type(optimizer).__name__} was given a closure and did not evaluate it: gradients"
                " are filtered only where plugin.filter_gradients() was called before; call step() "
                "without the closure"
            )
        self._has_begun, self._evaluations = False, 0
        self._end()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
