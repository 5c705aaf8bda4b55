"""Edge family `depth`: the same node of the same role in the next block, a path along the depth.

Source: Gradient Smoothing (arXiv 2606.30813), which smooths over layers.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from spectral_ds.graph.family import NodeByNode, Partner
from spectral_ds.graph.nodes import ParameterNodes


@dataclass(frozen=True)
class Depth(NodeByNode):
    """Node r of a parameter ~ node r of the parameter of equal role and shape in the next block.

    "Next" is the next block present, so that a missing block does not break the path.
    """

    weight: float = 1.0

    def links(self, parameters: Sequence[ParameterNodes]) -> list[tuple[int, int]]:
        """Pairs of parameters (by position) that this family joins."""
        paths: dict[object, list[tuple[int, int]]] = defaultdict(list)
        for position, parameter in enumerate(parameters):
            if parameter.block is not None:
                key = parameter.role, parameter.shape, parameter.storage
                paths[key].append((parameter.block, position))
        pairs = []
        for path in paths.values():
            path.sort()
            pairs += [(a, b) for (_, a), (_, b) in pairwise(path)]
        return pairs

    def partners(self, parameters: Sequence[ParameterNodes]) -> Iterable[tuple[int, int, Partner]]:
        """Each node and its own in the next block, see `NodeByNode.partners`."""
        return [(a, b, lambda node: node) for a, b in self.links(parameters)]
