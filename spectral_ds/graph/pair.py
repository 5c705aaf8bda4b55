"""Edge family `pair`: the same row of two weights of one block that work together.

Queries meet keys in a product, and so do gates and up-projections: row r of one acts only together
with row r of the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spectral_ds.graph.edges import Edges
from spectral_ds.graph.nodes import ParameterNodes

# Names that the two weights have in the model families of Hugging Face and in Llama's own code.
QUERY_AND_KEY = (("q_proj", "k_proj"), ("query", "key"), ("q_lin", "k_lin"), ("wq", "wk"))
GATE_AND_UP = (("gate_proj", "up_proj"), ("w1", "w3"))


class UnknownHeadWidthError(ValueError):
    """Queries and keys differ in number of heads, and the width of a head is not known."""


@dataclass(frozen=True)
class Pair:
    """Row r of a query ~ row r of its key, row r of a gate ~ row r of its up-projection.

    Under grouped-query attention, a row of a query head ~ the same row of the head of its group.

    Attributes:
        head_width: rows of one attention head; needed only for grouped-query attention.
        weight: factor of the family in W.
    """

    head_width: int | None = None
    weight: float = 1.0

    def links(self, parameters: Sequence[ParameterNodes]) -> list[tuple[int, int]]:
        """Pairs of parameters (by position) that this family joins."""
        position_of = {parameter.name: i for i, parameter in enumerate(parameters)}
        pairs = []
        for position, parameter in enumerate(parameters):
            path = parameter.name.split(".")
            for mine, other in (*QUERY_AND_KEY, *GATE_AND_UP):
                if mine in path and parameter.block is not None:
                    name = ".".join(other if part == mine else part for part in path)
                    partner = position_of.get(name)
                    if partner is not None and self._match(parameter, parameters[partner]):
                        pairs.append((position, partner))
        return pairs

    def _match(self, a: ParameterNodes, b: ParameterNodes) -> bool:
        """Whether the nodes of two partners can be joined.

        Raises:
            UnknownHeadWidthError: they are grouped, by heads of unknown width.
        """
        if a.shape == b.shape:
            return True
        if a.kind == "column" or len(a.shape) < 2 or a.shape[1:] != b.shape[1:]:
            return False
        if self.head_width is None:
            raise UnknownHeadWidthError(
                f"family pair: {a.name!r} has {a.rows} rows and {b.name!r} has {b.rows}, and the "
                "model's config does not tell the width of a head; set head_width"
            )
        if b.rows % self.head_width or a.rows % b.rows:
            raise UnknownHeadWidthError(
                f"family pair: heads of {self.head_width} rows do not divide the {a.rows} rows of "
                f"{a.name!r} and the {b.rows} of {b.name!r} into groups; set head_width"
            )
        return True

    def edges(
        self,
        parameters: Sequence[ParameterNodes],
        first_node: npt.NDArray[np.int64],
        sources: npt.NDArray[np.int64],
    ) -> Edges:
        """Directed edges from the source nodes to their partners; arguments as in `Depth.edges`."""
        parts = []
        for a, b in self.links(parameters):
            low, high = np.searchsorted(sources, (first_node[a], first_node[a + 1]))
            source = sources[low:high]
            node = source - first_node[a]
            if parameters[a].shape != parameters[b].shape:
                node = self._grouped(node, parameters[a], parameters[b])
            parts.append(Edges(source, node + first_node[b], np.ones(len(source))))
        return Edges.concatenate(parts)

    def _grouped(
        self, node: npt.NDArray[np.int64], query: ParameterNodes, key: ParameterNodes
    ) -> npt.NDArray[np.int64]:
        """The key's node for each node of the query."""
        assert self.head_width is not None, "checked by links"
        per_row = query.nodes // query.rows  # elements of a row, or 1
        row, element = node // per_row, node % per_row
        head, within = row // self.head_width, row % self.head_width
        group = head // (query.rows // key.rows)
        return (group * self.head_width + within) * per_row + element
