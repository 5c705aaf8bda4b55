"""Nodes: the rows, columns or elements of the parameters that a graph covers.

In: parameter names and shapes, name patterns. Out: `ParameterNodes`, one a parameter.
"""

import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

# "parameter" is what a graph of depth paths is made of: all rows of a parameter have the same
# neighbours there, so that the whole parameter counts as one node with a long signal.
NodeKind = Literal["row", "column", "element", "parameter"]


@dataclass(frozen=True)
class ParameterNodes:
    """The nodes of one parameter, seen as a matrix of shape[0] rows.

    A 0-D or 1-D parameter is one row; by `column`, too, it is one node.

    Attributes:
        kind: what a node is.
    """

    name: str
    shape: tuple[int, ...]
    kind: NodeKind = "row"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Columns of the matrix."""
        return self.numel // self.rows

    @property
    def nodes(self) -> int:
        if self.kind == "column":
            return self.columns if self.is_transposed else 1
        return {"row": self.rows, "element": self.numel, "parameter": 1}[self.kind]

    @property
    def width(self) -> int:
        """Elements of one node's signal."""
        return self.numel // self.nodes

    @property
    def is_transposed(self) -> bool:
        """Whether a node's elements lie a row apart in memory."""
        return self.kind == "column" and len(self.shape) > 1

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


def nodes_touched(
    start: Ints, end: Ints, nodes: Ints | int, width: int, is_transposed: bool
) -> Ints:
    """How many nodes the elements [start, end) of a flattened parameter belong to; (runs,).

    Args:
        start, end: (runs,); no run is empty.
        nodes, width, is_transposed: of the parameter, see `ParameterNodes`; nodes may be (runs,).
    """
    touched: Ints = (end - 1) // width - start // width + 1
    if is_transposed:
        touched = np.minimum(nodes, end - start)
    return touched


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
