"""Which parameters got a gradient since the last step, for engines that do not tell."""

from collections.abc import Iterable
from typing import Any

import torch


class UsedParameters:
    """Notes each parameter whose gradient a backward pass computes.

    A parameter that a step does not use keeps its last gradient in ZeRO-3 and in offloaded ZeRO-1
    and 2, and has a gradient of zeros in ZeRO-1 and 2 on the device; nothing in them tells it from
    a used one. All of them need every rank to use the same parameters, so that what this rank used
    is what all did.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._used: set[int] = set()
        self._handles: list[Any] = [
            parameter.register_post_accumulate_grad_hook(self._note) for parameter in parameters
        ]

    def _note(self, parameter: torch.Tensor) -> None:
        self._used.add(id(parameter))

    def __contains__(self, parameter: torch.Tensor) -> bool:
        return id(parameter) in self._used

    def clear(self) -> None:
        """Begin a new step."""
        self._used.clear()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
