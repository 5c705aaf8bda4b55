"""How an engine is hooked: a method wrapped on one object, or a torch optimizer's own hook.

Each gives a handle whose `remove()` undoes it. The steps of torch optimizers are in `steps`.
"""

import functools
from collections.abc import Callable
from typing import Any

from spectral_ds.engines.base import UnsupportedEngineError
from spectral_ds.engines.steps import is_nested, not_compiled


class WrappedMethod:
    """`around(original, *arguments)` in the place of a method of one object, until `remove`.

    Raises:
        UnsupportedEngineError: the object has no such method.
    """

    def __init__(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        require_method(owner, name)
        original = getattr(owner, name)
        self._owner, self._name, self._is_active = owner, name, True
        self._previous = vars(owner).get(name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._is_active:
                return around(original, *args, **kwargs)
            return original(*args, **kwargs)

        self._wrapper = wrapper
        setattr(owner, name, wrapper)

    def remove(self) -> None:
        self._is_active = False
        # If somebody wrapped our wrapper, it stays in their chain and only passes calls on.
        if vars(self._owner).get(self._name) is self._wrapper:
            if self._previous is None:
                delattr(self._owner, self._name)
            else:
                setattr(self._owner, self._name, self._previous)


def require_method(owner: Any, name: str) -> None:
    """Raise UnsupportedEngineError unless DeepSpeed's object has the private method."""
    if not hasattr(owner, name):
        raise UnsupportedEngineError(
            f"this DeepSpeed version has no {type(owner).__name__}.{name}, which spectral_ds "
            "uses; use DeepSpeed 0.19"
        )


def after_step_of(optimizer: Any, function: Callable[[], None]) -> Any:
    """Call the function after each step of a torch optimizer, of all its groups.

    Raises:
        UnsupportedEngineError: it is not a torch optimizer.
    """
    if not hasattr(optimizer, "register_step_post_hook"):
        raise UnsupportedEngineError(
            f"{type(optimizer).__name__} has no register_step_post_hook, by which spectral_ds "
            "acts on updates; use a torch.optim.Optimizer"
        )

    def after_step(stepped: Any, *_: Any) -> None:
        if not is_nested(stepped):
            function()

    return optimizer.register_step_post_hook(not_compiled(after_step))
