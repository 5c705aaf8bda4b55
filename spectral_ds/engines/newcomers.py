"""Parameters that an optimizer comes to train after the plugin was attached.

They were unfrozen, added to the optimizer, or are those of a layer that took another's place. Each
is found once: it is taken in, or left out with a reason.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Admission:
    """What became of newcomers.

    Attributes:
        joined: names of those that the engine now has in `shapes` and `fragments`.
        left_out: why not, by name.
        undo: takes back what the engine changed.
    """

    joined: Sequence[str]
    left_out: Mapping[str, str]
    undo: Callable[[], None] = lambda: None


class Known:
    """The parameters that have been looked at; keeps none alive.

    Args:
        parameters: those at attach.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        self._references: dict[int, weakref.ref[torch.Tensor]] = {}
        self.add(parameters)

    def add(self, parameters: Iterable[torch.Tensor]) -> None:
        """Count these as looked at."""
        self._references |= {id(parameter): weakref.ref(parameter) for parameter in parameters}

    def others(self, groups: Iterable[Mapping[str, Any]]) -> list[torch.Tensor]:
        """Of the parameters in an optimizer's groups, the others that its step may change."""
        references = self._references
        return [
            parameter
            for group in groups
            for parameter in group["params"]
            if ((known := references.get(id(parameter))) is None or known() is not parameter)
            and (parameter.requires_grad or parameter.grad is not None)
            and parameter.numel() > 0
        ]


def label_of(parameter: torch.Tensor, names: Mapping[int, str], module: torch.nn.Module) -> str:
    """A parameter for people: its name, or that it has none.

    Args:
        names: of the module's parameters, by id.
    """
    unnamed = f"one of shape {tuple(parameter.shape)} outside of {type(module).__name__}"
    return names.get(id(parameter), unnamed)
