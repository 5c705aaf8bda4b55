"""Nodes: the rows, columns or elements of the parameters that a graph covers.

In: parameter names and shapes, name patterns. Out: `ParameterNodes`, one a parameter.
"""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from spectral_ds.graph.roles import places

Ints = npt.NDArray[np.int64]

# "parameter" is what a graph of depth paths is made of: all rows of a parameter have the same
# neighbours there, so that the whole parameter counts as one node with a long signal.
NodeKind = Literal["row", "column", "element", "parameter"]


@dataclass(frozen=True)
class Storage:
    """How the matrices of a parameter lie in its tensor, where that is not (outputs, inputs).

    Attributes:
        is_stacked: whether the first dimension counts matrices, or vectors, of their own: experts.
        is_input_first: whether a matrix is stored as (inputs, outputs).
    """

    is_stacked: bool = False
    is_input_first: bool = False


USUAL_STORAGE = Storage()


@dataclass(frozen=True)
class ParameterNodes:
    """The nodes of one parameter, seen as a matrix of (outputs, inputs), or as a stack of some.

    Without `storage`, a tensor is a matrix of shape[0] rows; a 0-D or 1-D one is one row. A vector
    is one node, by `column` too.

    Attributes:
        kind: what a node is; a row is all that enters one output.
        role, block: see `graph.roles.Place`; by default as in a model of this parameter alone.
        storage: where the matrices lie.
    """

    name: str
    shape: tuple[int, ...]
    kind: NodeKind = "row"
    role: str = ""
    block: int | None = None
    storage: Storage = USUAL_STORAGE

    @property
    def dimensions(self) -> str:
        """What the dimensions of the tensor are, where they are not (outputs, inputs)."""
        matrix = "inputs, outputs" if self.storage.is_input_first else "outputs, inputs"
        if len(self.matrix_shape) < 2:
            matrix = "outputs"
        return f"(experts, {matrix})" if self.storage.is_stacked else f"({matrix})"

    def __post_init__(self) -> None:
        if not self.role:
            place = places({self.name: self.shape})[self.name]
            object.__setattr__(self, "role", place.role)
            object.__setattr__(self, "block", place.block)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def matrices(self) -> int:
        """How many matrices the nodes are divided among; a `parameter` has one node in all."""
        return self.shape[0] if self.storage.is_stacked and self.kind != "parameter" else 1

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of one matrix as it is stored."""
        return self.shape[1:] if self.storage.is_stacked else self.shape

    @property
    def rows(self) -> int:
        """Rows of all matrices as they are stored."""
        count = self.shape[0] if self.storage.is_stacked else 1
        return count * (self.matrix_shape[0] if len(self.matrix_shape) > 1 else 1)

    @property
    def columns(self) -> int:
        """Columns of a matrix as it is stored."""
        return self.numel // self.rows

    @property
    def nodes(self) -> int:
        if self.kind in ("row", "column"):
            return self.matrices * self.columns if self.is_transposed else self.rows
        return self.numel if self.kind == "element" else 1

    @property
    def nodes_of_matrix(self) -> int:
        """How many nodes each matrix has."""
        return self.nodes // self.matrices

    @property
    def width(self) -> int:
        """Elements of one node's signal."""
        return self.numel // self.nodes

    @property
    def is_transposed(self) -> bool:
        """Whether a node's elements lie a row apart in memory."""
        is_matrix = len(self.matrix_shape) > 1 and self.kind in ("row", "column")
        return is_matrix and (self.kind == "column") != self.storage.is_input_first


def parameter_nodes(
    shapes: Mapping[str, tuple[int, ...]],
    kind: NodeKind = "row",
    storage: Mapping[str, Storage] | None = None,
) -> dict[str, ParameterNodes]:
    """The nodes of all parameters of a model, by name.

    Args:
        shapes: of all of them: which number in a name counts blocks shows only among all.
        storage: where a parameter's matrices do not lie as usual.
    """
    return {
        name: ParameterNodes(
            name, shapes[name], kind, *place, (storage or {}).get(name, USUAL_STORAGE)
        )
        for name, place in places(shapes).items()
    }


def nodes_touched(
    start: Ints,
    end: Ints,
    nodes: Ints | int,
    width: int,
    is_transposed: npt.NDArray[np.bool_] | bool,
) -> Ints:
    """How many nodes the elements [start, end) of a flattened parameter belong to; (runs,).

    Args:
        start, end: (runs,); no run is empty.
        nodes: of one of the parameter's matrices; may be (runs,).
        width: of a node's signal.
        is_transposed: see `ParameterNodes`; may be (runs,).
    """
    size = nodes * width  # of a matrix
    first, last = start // size, (end - 1) // size
    inside = np.minimum(nodes, end - start)
    ends = np.minimum(nodes, (first + 1) * size - start) + np.minimum(nodes, end - last * size)
    by_column = np.where(first == last, inside, ends + (last - first - 1) * nodes)
    by_row = (end - 1) // width - start // width + 1
    touched: Ints = np.where(is_transposed, by_column, by_row)
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
