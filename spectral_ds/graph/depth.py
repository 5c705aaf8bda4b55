"""Edge family `depth`: the same node of the same role in the next block, a path along the depth.

Source: Gradient Smoothing (arXiv 2606.30813), which smooths over layers.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from spectral_ds.graph.edges import Edges
from spectral_ds.graph.nodes import ParameterNodes


@dataclass(frozen=True)
class Depth:
    """Node r of a parameter ~ node r of the parameter of equal role and shape in the next block.

    "Next" is the next block present, so that a missing block does not break the path.
    """

    weight: float = 1.0

    def links(self, parameters: Sequence[ParameterNodes]) -> list[tuple[int, int]]:
        """Pairs of parameters (by position) that this family joins."""
        paths: dict[tuple[str, tuple[int, ...]], list[tuple[int, int]]] = defaultdict(list)
        for position, parameter in enumerate(parameters):
            if parameter.block is not None:
                paths[parameter.role, parameter.shape].append((parameter.block, position))
        pairs = []
        for path in paths.values():
            path.sort()
            pairs += [(a, b) for (_, a), (_, b) in pairwise(path)]
        return pairs

    def edges(
        self,
        parameters: Sequence[ParameterNodes],
        first_node: npt.NDArray[np.int64],
        sources: npt.NDArray[np.int64],
    ) -> Edges:
        """One directed edge from each source node to its own in the next block.

        Args:
            parameters: the parameters whose nodes are numbered.
            first_node: number of each parameter's first node, and the count of all at the end;
                shape (parameters + 1,).
            sources: sorted node numbers to make edges for.
        """
        parts = []
        for a, b in self.links(parameters):
            low, high = np.searchsorted(sources, (first_node[a], first_node[a + 1]))
            source = sources[low:high]
            parts.append(
                Edges(source, source - first_node[a] + first_node[b], np.ones(len(source)))
            )
        return Edges.concatenate(parts)
