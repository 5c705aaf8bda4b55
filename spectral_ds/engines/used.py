"""Which parameters got a gradient since the last step, for engines that keep old ones."""

from collections.abc import Iterable
from typing import Any

import torch


class UsedParameters:
    """Notes each parameter whose gradient a backward pass computes.

    ZeRO-3 and offloaded ZeRO-1 and 2 keep the last step's gradient of a parameter that a step does
    not use, and nothing in them tells the two apart.
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
