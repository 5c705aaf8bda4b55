"""Edge family `similarity`: k nearest nodes by the cosine of their features.

In: the features of all nodes of one scope. Out: neighbours and squared distances of some of them.
How features are collected across ranks is `sketches/features.py`.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from spectral_ds.graph.nodes import ParameterNodes

# Cosines are compared to this resolution, so that nodes at equal distance are ordered by number
# and not by rounding, which depends on how rows are divided among ranks. Sketches of weights are
# float64 sums; those of gradients add up in float32.
COSINE_STEPS = {"weights": 10**9, "gradient": 10**6}

# A block of the cosine matrix holds at most this many elements (float64: 128 MiB).
BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Similarity:
    """w = exp(−d²/(2σ²)) to the `neighbours` nearest nodes, d² = 2(1 − cos).

    σ² is the mean d² over all pairs found in the scope. The source paper joins parameters by
    their similarity (arXiv 2504.19583) without saying how; this is the usual k-NN graph with a
    Gaussian kernel (von Luxburg 2007, section 2.2).

    Attributes:
        neighbours: k; a node of a smaller scope takes all others.
        scope: nodes are compared within their `parameter` (within their matrix, where it is a
            stack of some), or with all nodes of their `role`.
        features: what is compared: the `weights`, or the running mean of the `gradient`.
        sketch_width: longer features are replaced by their Gaussian random projection to this
            width; 0: never.
        weight: factor of the family in W.
    """

    neighbours: int = 8
    scope: Literal["parameter", "role"] = "parameter"
    features: Literal["weights", "gradient"] = "weights"
    sketch_width: int = 64
    weight: float = 1.0

    def scopes(self, parameters: Sequence[ParameterNodes]) -> list[list[int]]:
        """Positions of the parameters whose nodes are compared with each other."""
        if self.scope == "parameter":
            return [[position] for position in range(len(parameters))]
        roles: dict[tuple[str, int], list[int]] = defaultdict(list)
        for position, parameter in enumerate(parameters):
            roles[parameter.role, parameter.width].append(position)
        return list(roles.values())

    def parts(self, parameters: Sequence[ParameterNodes]) -> int:
        """How many equal parts the nodes of a scope fall into, each compared within itself."""
        return parameters[0].matrices if self.scope == "parameter" else 1

    def links(self, parameters: Sequence[ParameterNodes]) -> list[tuple[int, int]]:
        """Pairs of parameters (by position) that this family may join."""
        return [(a, b) for scope in self.scopes(parameters) for a, b in pairwise(scope)]


def nearest(
    features: torch.Tensor, rows: torch.Tensor, neighbours: int, cosine_steps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The nearest nodes by cosine, ties by node number. A zero feature has no neighbours.

    Args:
        features: (nodes, feature width), float64.
        rows: (n,), int64: the nodes to find neighbours for.
        neighbours: k >= 1.
        cosine_steps: cosines that differ by less than 1/cosine_steps may count as equal.

    Returns:
        source, target (pairs,), int64, and squared distance d² = 2(1 − cos) (pairs,), float64.
    """
    nodes = features.shape[0]
    count = min(neighbours, nodes - 1)
    length = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    unit = features / length.clamp_min(torch.finfo(features.dtype).tiny)
    is_zero = length.squeeze(1) == 0
    number = torch.arange(nodes, device=features.device)
    parts = []
    for block in rows.split(max(1, BLOCK_ELEMENTS // max(nodes, 1))) if count > 0 else ():
        cosine = ((unit[block] @ unit.T).clamp_(-1, 1) * cosine_steps).round_().long()
        # One integer orders by cosine first, by lower node number second.
        key = (cosine + cosine_steps) * nodes + (nodes - 1 - number)
        key[:, is_zero] = -1
        key.scatter_(1, block[:, None], -1)
        key, target = key.topk(count, dim=1)
        valid = (key >= 0) & ~is_zero[block][:, None]
        cosine = key.div(nodes, rounding_mode="floor") - cosine_steps
        distance = 2 - cosine.double() * (2 / cosine_steps)
        source = block[:, None].expand_as(target)
        parts.append((source[valid], target[valid], distance[valid].clamp_min_(0)))
    if not parts:
        empty = rows.new_zeros(0)
        return empty, empty, features.new_zeros(0)
    source, target, distance = (torch.cat(part) for part in zip(*parts, strict=True))
    return source, target, distance


def nearest_in_parts(
    features: torch.Tensor, rows: torch.Tensor, neighbours: int, cosine_steps: int, parts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`nearest` within each of so many equal parts of the nodes."""
    if parts == 1:
        return nearest(features, rows, neighbours, cosine_steps)
    size = len(features) // parts
    found = []
    for first in range(0, len(features), size):
        own = rows[(rows >= first) & (rows < first + size)] - first
        source, target, distance = nearest(
            features[first : first + size], own, neighbours, cosine_steps
        )
        found.append((source + first, target + first, distance))
    source, target, distance = (torch.cat(part) for part in zip(*found, strict=True))
    return source, target, distance


def gaussian_weight(squared_distance: torch.Tensor, mean: float) -> torch.Tensor:
    """exp(−d²/(2σ²)), σ² = mean; all 1 where every pair coincides (σ² = 0)."""
    if mean == 0:
        return torch.ones_like(squared_distance)
    return torch.exp(squared_distance / (-2 * mean))
