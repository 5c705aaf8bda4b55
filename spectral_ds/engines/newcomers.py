"""Parameters that an optimizer comes to train after the plugin was attached.

They were unfrozen, added to the optimizer, or are those of a layer that took another's place. Each
is found once: it is taken in, or left out with a reason; and again when it had left and comes back.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

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
    """The parameters of an optimizer that have been looked at; forgets those that have left it.

    It has no weak references to them: torch moves no tensor that has any to another device or dtype
    where it does so by swapping, as with those of FSDP2.

    Args:
        parameters: those at attach.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        # Each with whether it was trainable: a frozen one is another thing once it is unfrozen.
        self._seen: dict[int, tuple[torch.Tensor, bool]] = {}
        self.add(parameters)

    def add(self, parameters: Iterable[torch.Tensor]) -> None:
        """Count these as looked at."""
        self._seen |= {id(p): (p, p.requires_grad) for p in parameters}

    def __contains__(self, parameter: torch.Tensor) -> bool:
        if id(parameter) not in self._seen:
            return False
        _, was_trainable = self._seen[id(parameter)]
        return was_trainable or not parameter.requires_grad

    def others(self, groups: Iterable[Iterable[torch.Tensor]]) -> list[torch.Tensor]:
        """Of the parameters in an optimizer's groups, the others that its step may change."""
        present = [parameter for group in groups for parameter in group]
        self._seen = {id(p): self._seen[id(p)] for p in present if id(p) in self._seen}
        return [
            parameter
            for parameter in present
            if parameter not in self
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


def reason_to_leave_out(is_named: bool) -> str:
    """Why a parameter that has no fragment, although the optimizer trains it, gets none."""
    if is_named:
        return "frozen, yet with a gradient, by which the optimizer moves them"
    return "the optimizer trains them, but the module that the plugin is attached to lacks them"
