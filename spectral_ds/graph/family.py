"""Edge families that follow from names and shapes: each node is joined to one other, by a rule."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from spectral_ds.graph.edges import Edges
from spectral_ds.graph.nodes import Ints, ParameterNodes

# From nodes of one parameter to their partners in another, both numbered from 0.
Partner = Callable[[Ints], Ints]


class NodeByNode(ABC):
    """A family that joins node r of one parameter to a node of another, or of the same."""

    @abstractmethod
    def partners(self, parameters: Sequence[ParameterNodes]) -> Iterable[tuple[int, int, Partner]]:
        """(a, b, partner): node r of parameter a is joined to node partner(r) of parameter b.

        Parameters are told by position.
        """

    def edges(self, parameters: Sequence[ParameterNodes], first_node: Ints, sources: Ints) -> Edges:
        """One directed edge of weight 1 from each source node that has a partner.

        Args:
            parameters: the parameters whose nodes are numbered.
            first_node: number of each parameter's first node, and the count of all at the end;
                (parameters + 1,).
            sources: sorted node numbers to make edges for.
        """
        parts = []
        for a, b, partner in self.partners(parameters):
            low, high = np.searchsorted(sources, (first_node[a], first_node[a + 1]))
            source = sources[low:high]
            target = partner(source - first_node[a]) + first_node[b]
            parts.append(Edges(source, target, np.ones(len(source))))
        return Edges.concatenate(parts)
