"""Edge family `ring`: each node of a parameter and the next, the last and the first.

Source: Laplacian Smoothing Gradient Descent (arXiv 1806.06317), whose ring joins elements.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spectral_ds.graph.edges import Edges
from spectral_ds.graph.nodes import ParameterNodes


@dataclass(frozen=True)
class Ring:
    """Node r ~ node (r + 1) mod n of the same parameter; two nodes have one edge, one has none."""

    weight: float = 1.0

    def links(self, parameters: Sequence[ParameterNodes]) -> list[tuple[int, int]]:
        """Pairs of parameters that this family joins: none."""
        return []

    def edges(
        self,
        parameters: Sequence[ParameterNodes],
        first_node: npt.NDArray[np.int64],
        sources: npt.NDArray[np.int64],
    ) -> Edges:
        """One directed edge from each source node to the next; arguments as in `Depth.edges`."""
        parameter = np.searchsorted(first_node, sources, side="right") - 1
        first, count = first_node[parameter], np.diff(first_node)[parameter]
        joined = count > 1
        source = sources[joined]
        target = first[joined] + (source - first[joined] + 1) % count[joined]
        return Edges(source, target, np.ones(len(source)))
