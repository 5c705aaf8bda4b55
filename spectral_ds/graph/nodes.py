"""Nodes: the rows of the parameters that a graph covers.

In: parameter names and shapes, name patterns. Out: `ParameterNodes`, one a parameter.
"""

import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ParameterNodes:
    """The nodes of one parameter: its rows along dimension 0.

    A 0-D or 1-D parameter is one node whose width is its number of elements.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Elements of one node's signal."""
        return math.prod(self.shape[1:]) if len(self.shape) > 1 else self.numel

    @property
    def block(self) -> int | None:
        """The first integer in the dotted name: `model.layers.3.mlp.weight` is of block 3."""
        return next((int(part) for part in self.name.split(".") if part.isdigit()), None)

    @property
    def role(self) -> str:
        """The name with its block index replaced by `*`."""
        parts = self.name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                parts[i] = "*"
                break
        return ".".join(parts)


def match_parameters(
    names: Iterable[str], include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Choose parameters by shell patterns (`*`, `?`, `[seq]`) on their full names.

    Returns:
        The names that match some pattern of `include` and none of `exclude`, in order, and the
        patterns of both lists that match no name at all.
    """
    names = list(names)
    matches = {
        pattern: {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        for pattern in (*include, *exclude)
    }
    included = set().union(*(matches[pattern] for pattern in include))
    excluded = set().union(*(matches[pattern] for pattern in exclude))
    chosen = [name for name in names if name in included and name not in excluded]
    return chosen, [pattern for pattern, found in matches.items() if not found]
