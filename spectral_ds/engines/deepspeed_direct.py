"""Steps of a DeepSpeed engine's optimizer by its own `step()`, in place of `engine.step()`.

DeepSpeed then trains as well, if gradients are averaged by then, and counts nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from spectral_ds.engines.hooks import WrappedMethod
from spectral_ds.engines.steps import StepCalls
from spectral_ds.engines.wrappers import has_hooks


class DirectSteps:
    """Calls hooks at each step that the program takes by `engine.optimizer.step()`.

    Args:
        engine: the user's DeepSpeed engine.

    Attributes:
        taken: such steps so far, skipped ones included.
        skipped: those that the optimizer skipped because of non-finite gradients.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._optimizer = engine, engine.optimizer
        self.taken = self.skipped = 0
        self._calls: StepCalls | None = None
        self._is_within = False  # a step of the engine, which steps the optimizer
        self._has_warned = False

    def install(
        self, begin: Callable[[], None], ready: Callable[[], None], warn: Callable[[str], None]
    ) -> Any:
        """Call the hooks as `StepCalls` does; the handle of them."""
        outside = self._unless_within
        if has_hooks(self._optimizer):  # a scheduler may wrap its `step`
            self._calls = StepCalls(
                self._optimizer, outside(begin, warn), outside(ready, warn), self._end, warn
            )
            return self._calls

        def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            outside(begin, warn)()
            outside(ready, warn)()
            result = original(*args, **kwargs)
            self._end()
            return result

        return WrappedMethod(self._optimizer, "step", step)

    @property
    def evaluations(self) -> int:
        """See `Engine.evaluations`."""
        return 0 if self._calls is None else self._calls.evaluations

    @contextmanager
    def within_engine_step(self) -> Iterator[None]:
        """Take steps of the optimizer as parts of one of the engine."""
        self._is_within = True
        try:
            yield
        finally:
            self._is_within = False

    def _unless_within(
        self, hook: Callable[[], None], warn: Callable[[str], None]
    ) -> Callable[[], None]:
        def call() -> None:
            if self._is_within:
                return
            if self._engine.is_gradient_accumulation_boundary():
                hook()
            elif not self._has_warned:
                self._has_warned = True
                warn(
                    "optimizer.step() before a boundary of gradient accumulation, where DeepSpeed "
                    "has not averaged the gradients: they are not filtered; call engine.step() "
                    "after each backward, or engine.set_gradient_accumulation_boundary before it"
                )

        return call

    def _end(self) -> None:
        if not self._is_within:
            self.taken += 1
            self.skipped += bool(getattr(self._optimizer, "overflow", False))
