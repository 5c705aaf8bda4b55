"""Edge family `ring`: each node of a parameter and the next, the last and the first.

Source: Laplacian Smoothing Gradient Descent (arXiv 1806.06317), whose ring joins elements.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spectral_ds.graph.family import NodeByNode, Partner
from spectral_ds.graph.nodes import Ints, ParameterNodes


@dataclass(frozen=True)
class Ring(NodeByNode):
    """Node r ~ node (r + 1) mod n of the same matrix; two nodes have one edge, one has none."""

    weight: float = 1.0

    def links(self, parameters: Sequence[ParameterNodes]) -> list[tuple[int, int]]:
        """Pairs of parameters that this family joins: none."""
        return []

    def partners(self, parameters: Sequence[ParameterNodes]) -> Iterable[tuple[int, int, Partner]]:
        """Each node and the next of its matrix, see `NodeByNode.partners`."""
        return [
            (position, position, _next_of(parameter.nodes_of_matrix))
            for position, parameter in enumerate(parameters)
            if parameter.nodes_of_matrix > 1
        ]


def _next_of(nodes: int) -> Partner:
    def following(node: Ints) -> Ints:
        return node - node % nodes + (node + 1) % nodes

    return following
