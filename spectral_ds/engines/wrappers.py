"""Which optimizer moves the weights, inside look-ahead, sharpness-aware and Accelerate's wrappers.

In: what the user calls the optimizer. Out: the torch optimizer whose `step` is to be hooked.
"""

from typing import Any

import torch

from spectral_ds.engines.base import UnsupportedEngineError


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What it trains at present, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def layers_of(optimizer: Any) -> list[Any]:
    """The optimizer, what it wraps, and so on; the last one wraps nothing.

    One that torch has hooks for wraps another only if that trains all the same parameters: it steps
    by it, as sharpness-aware optimizers do, so that the gradient that is descended is the one that
    the other is given.
    """
    layers = [optimizer]
    while True:
        inside = _inside(layers[-1]).values()
        inner = [each for each in inside if all(each is not layer for layer in layers)]
        if has_hooks(layers[-1]):
            own = set(map(id, parameters_of(layers[-1])))
            inner = [each for each in inner if set(map(id, parameters_of(each))) == own]
        if len(inner) != 1:
            return layers
        layers.append(inner[0])


def stepping_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer that moves the weights: the innermost of `layers_of`.

    Raises:
        UnsupportedEngineError: there is none, or it is not known which; says what to pass.
    """
    if isinstance(optimizer, list | tuple | dict):
        raise UnsupportedEngineError(
            f"optimizer: got a {type(optimizer).__name__} of {len(optimizer)}; a plugin filters "
            "all gradients of a step together, so pass one optimizer, with several parameter "
            "groups if need be, which steps after the backward pass"
        )
    innermost = layers_of(optimizer)[-1]
    name = type(innermost).__name__
    if not has_hooks(innermost):
        inner = ", ".join(f".{attribute}" for attribute in _inside(innermost))
        raise UnsupportedEngineError(
            f"optimizer: {name} does not call torch.optim.Optimizer.__init__, so that its steps "
            + (f"cannot be followed, and steps several; pass one of {inner}" if inner else "")
            + ("" if inner else "cannot be followed; pass the torch optimizer that it steps")
        )
    if takes_half_steps(innermost):
        raise UnsupportedEngineError(
            f"optimizer: {name} takes two half-steps (first_step, second_step) by itself, so that "
            "it cannot be known which gradient it descends; use one that steps a torch optimizer "
            "in its second half, such as .base_optimizer"
        )
    found: torch.optim.Optimizer = innermost
    return found


def has_hooks(optimizer: Any) -> bool:
    """Whether it is a torch optimizer, made as such, which calls hooks at its steps."""
    return isinstance(optimizer, torch.optim.Optimizer) and "_optimizer_step_pre_hooks" in vars(
        optimizer
    )


def takes_half_steps(optimizer: Any) -> bool:
    """Whether it climbs by one gradient and descends by a second, as sharpness-aware ones do."""
    return all(callable(getattr(optimizer, half, None)) for half in ("first_step", "second_step"))


def _inside(optimizer: Any) -> dict[str, Any]:
    """By attribute: what an optimizer holds that has a `step` and parameter groups itself."""
    found: dict[str, Any] = {}
    for attribute, value in getattr(optimizer, "__dict__", {}).items():
        is_optimizer = callable(getattr(type(value), "step", None)) and isinstance(
            getattr(value, "param_groups", None), list
        )
        if is_optimizer and all(value is not each for each in found.values()):
            found[attribute] = value
    return found
