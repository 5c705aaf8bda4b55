"""Edge family `pair`: the same row of two weights of one block that work together.

Queries meet keys in a product, and so do gates and up-projections: row r of one acts only together
with row r of the other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from spectral_ds.graph.family import NodeByNode, Partner
from spectral_ds.graph.nodes import USUAL_STORAGE, Ints, ParameterNodes
from spectral_ds.graph.roles import is_numbered

# Names that the two weights have in the model families of Hugging Face and in Llama's own code.
QUERY_AND_KEY = (("q_proj", "k_proj"), ("query", "key"), ("q_lin", "k_lin"), ("wq", "wk"))
GATE_AND_UP = (("gate_proj", "up_proj"), ("w1", "w3"))


class UnknownHeadWidthError(ValueError):
    """Queries and keys differ in number of heads, and the width of a head is not known."""


@dataclass(frozen=True)
class Pair(NodeByNode):
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
                if mine in path and is_numbered(parameter.name):
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
            return a.storage == b.storage
        usual = a.storage == b.storage == USUAL_STORAGE
        if not usual or a.kind == "column" or len(a.shape) < 2 or a.shape[1:] != b.shape[1:]:
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

    def partners(self, parameters: Sequence[ParameterNodes]) -> Iterable[tuple[int, int, Partner]]:
        """Each node and its partner in the other weight, see `NodeByNode.partners`."""
        for a, b in self.links(parameters):
            mine, other = parameters[a], parameters[b]
            if mine.shape == other.shape:
                yield a, b, lambda node: node
            else:
                yield a, b, partial(self._key_of, query=mine, key=other)

    def _key_of(self, node: Ints, query: ParameterNodes, key: ParameterNodes) -> Ints:
        """The key's node for each node of the query."""
        assert self.head_width is not None, "checked by links"
        per_row = query.nodes // query.rows  # elements of a row, or 1
        row, element = node // per_row, node % per_row
        head, within = row // self.head_width, row % self.head_width
        group = head // (query.rows // key.rows)
        return (group * self.head_width + within) * per_row + element
