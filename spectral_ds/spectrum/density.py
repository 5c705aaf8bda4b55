"""Density of states: how a graph's eigenvalues are spread over the spectrum.

Source: Weiße et al., "The kernel polynomial method", Rev. Mod. Phys. 78, 275 (2006), sections II.B
and II.C: moments are traces, and traces are means over random probes.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.laplacian import Group, ParameterGraph, plan_on_node_signals
from spectral_ds.sharding import Communicator
from spectral_ds.spectrum.bands import COEFFICIENTS_PER_BAND, band_coefficients, equal_edges
from spectral_ds.spectrum.eigenpairs import DENSE_NODES, dense_laplacian
from spectral_ds.spectrum.moments import chebyshev_moments
from spectral_ds.spectrum.rings import ring_eigenvalues_below, ring_weight


class Density(NamedTuple):
    """Share of the eigenvalues in each of equal bins of [0, λ_max]; as `numpy.histogram` has them.

    Attributes:
        share: (bins,), float64, sums to 1.
        edges: (bins + 1,): frequencies λ.
    """

    share: npt.NDArray[np.float64]
    edges: npt.NDArray[np.float64]


def density_of_states(
    graph: ParameterGraph,
    bins: int,
    communicator: Communicator,
    *,
    seed: int,
    probes: int = 16,
    dense_nodes: int = DENSE_NODES,
) -> Density:
    """The density of states, equal on all ranks and at every world size (collective).

    Args:
        bins: number of bins.
        communicator: the ranks that share the parameters.
        seed: of the probes.
        probes: random vectors with entries ±1; the error falls with their root.
        dense_nodes: groups of so many nodes or fewer are counted exactly; so are depth paths and
            rings.
    """
    edges = equal_edges(bins) * graph.lambda_max
    counts = np.zeros(bins)
    large = []
    for group in graph.groups:
        if group.is_path or group.bucket.nodes <= dense_nodes:
            values = np.linalg.eigvalsh(dense_laplacian(graph, group, communicator))
            # Rounding must not carry an eigenvalue out of the spectrum or over an edge.
            values = np.clip(values.round(12), 0, graph.lambda_max)
            counts += np.histogram(values, edges)[0] * group.copies
        elif (weight := ring_weight(group, communicator)) is not None:
            below = ring_eigenvalues_below(group, weight, graph.normalized, edges)
            counts += np.diff(below)
        else:
            large.append(group)
    if large:
        counts += _estimated(graph, large, bins, communicator, seed, probes)
    return Density(counts / counts.sum(), edges)


def _estimated(
    graph: ParameterGraph,
    groups: list[Group],
    bins: int,
    communicator: Communicator,
    seed: int,
    probes: int,
) -> npt.NDArray[np.float64]:
    """Number of eigenvalues in each bin."""
    part = graph.of_groups(groups)
    layout = part.primary_layout(probes, communicator.world_size)
    columns = {parameter.name: probes for parameter in part.parameters}
    plan = plan_on_node_signals(
        part, columns, layout, communicator, communicator, bucket_elements=2**24
    )
    own: list[torch.Tensor] = [torch.empty(0, dtype=torch.float32, device="cpu")] * len(layout.own)
    for number, parameter in enumerate(part.parameters):  # equal at every world size
        generator = torch.Generator().manual_seed((seed + number) % 2**63)
        size = (parameter.nodes * probes,)
        bits = torch.randint(0, 2, size, generator=generator, dtype=torch.int8, device="cpu")
        for at, fragment in enumerate(layout.own):
            if fragment.parameter == parameter.name:
                signs = 2 * bits[fragment.start : fragment.end] - 1
                own[at] = signs.to(communicator.device, torch.float32)
    count = COEFFICIENTS_PER_BAND * bins // 2 * 2
    moments = chebyshev_moments(plan.operators, own, count, communicator)
    coefficients = band_coefficients(equal_edges(bins), count)
    return np.asarray(coefficients @ (moments / probes).cpu().numpy())
