"""Eigenpairs of a ring in closed form, waves: an iteration would take as long as the ring is wide.

Of n >= 3 nodes with edges of weight w, L = D − W has the eigenvalues 2w (1 − cos(2πm/n)), of
cosines and sines of m waves around the ring; of the normalized Laplacian they are divided by 2w.
"""

import math

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.laplacian import Group
from spectral_ds.sharding import Communicator

Values = npt.NDArray[np.float64]


def ring_weight(group: Group, communicator: Communicator) -> float | None:
    """The weight of each edge if the group is one ring in the order of its nodes (collective)."""
    nodes = group.bucket.nodes
    edges = group.primary_edges(communicator.rank)
    weight = float(group.degree[0]) / 2
    step = (edges.target - edges.source) % max(nodes, 1)
    is_ring = (
        nodes >= 3
        and len(group.parameters) == 1
        and bool(np.isin(step, (1, nodes - 1)).all())
        and np.allclose(edges.weight, weight, rtol=1e-12, atol=0)
        and len(edges) == 2 * len(group.primary_rows(communicator.rank))
    )
    return weight if communicator.maximum(float(not is_ring)) == 0 else None


def ring_eigenpairs(
    group: Group, weight: float, count: int, normalized: bool, communicator: Communicator
) -> tuple[Values, Values, Values]:
    """The lowest eigenvalues, the rows of their eigenvectors of a rank, and ‖L u − λ u‖.

    Args:
        weight: from `ring_weight`.
        count: how many; at most the nodes.
        communicator: sums the squares of the residuals.
    """
    nodes = group.bucket.nodes
    number = np.arange(min(count, nodes))
    waves = (number + 1) // 2  # 0, 1, 1, 2, 2, ...
    factor = 1.0 if normalized else 2 * weight
    values = factor * 2 * np.sin(math.pi * waves / nodes) ** 2  # 1 − cos, without cancellation
    # Even numbers are cosines; a cosine of no wave, or of half as many as nodes, is of length √n.
    is_sine = number % 2 == 1
    is_sine[2 * waves == nodes] = False
    is_alone = (waves == 0) | (2 * waves == nodes)
    scale = np.where(is_alone, 1.0, math.sqrt(2)) / math.sqrt(nodes)

    def waves_at(rows: npt.NDArray[np.int64]) -> Values:
        angle = 2 * math.pi / nodes * (np.outer(rows, waves) % nodes)
        return np.asarray(scale * np.where(is_sine, np.sin(angle), np.cos(angle)))

    rows = group.primary_rows(communicator.rank)
    vectors = waves_at(rows)
    product = factor * (vectors - (waves_at(rows - 1) + waves_at(rows + 1)) / 2)
    squares = torch.from_numpy(np.square(product - vectors * values).sum(axis=0))
    residuals = communicator.sum_(squares.to(communicator.device)).sqrt().cpu().numpy()
    return values, vectors, residuals


def ring_eigenvalues_below(
    group: Group, weight: float, normalized: bool, frequencies: Values
) -> Values:
    """How many eigenvalues lie below each of some frequencies.

    Args:
        weight: from `ring_weight`.
        frequencies: ascending, from 0 to the end of the spectrum, which counts all.
    """
    nodes = group.bucket.nodes
    highest = 2 * (1.0 if normalized else 2 * weight)
    share = np.clip(frequencies / highest, 0, 1)
    # 0, 1, ... waves lie below; rounding must not carry one over an edge.
    waves = np.ceil(nodes / math.pi * np.arcsin(np.sqrt(share)) - 1e-9)
    below = np.clip(2 * waves - 1, 0, nodes)  # each but none is a cosine and a sine
    below[-1] = nodes
    return np.asarray(below)
