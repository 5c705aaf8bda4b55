"""Roughness: how fast a signal changes over the graph, parameter by parameter."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.laplacian import LaplacianOperator, Matrix
from spectral_ds.sharding import Communicator, Signal


def roughness(
    operators: Sequence[LaplacianOperator],
    signal: Signal,
    names: Sequence[str],
    communicator: Communicator,
) -> npt.NDArray[np.float64]:
    """⟨X, L X⟩ / (λ_max ‖X‖²) of each parameter, from 0, smooth, to 1 (collective).

    Args:
        operators: one a bucket.
        signal: this rank's fragments, flat; None counts as zeros.
        names: parameters to measure, equal on all ranks.

    Returns:
        (parameters,), equal on all ranks; NaN for a zero signal and outside the graph.
    """
    position = {name: index for index, name in enumerate(names)}
    sums = torch.zeros(2, len(names), dtype=torch.float64, device=communicator.device)
    for operator in operators:
        x, y, _ = operator.scratch
        operator.load(signal, x)
        operator.apply(x, y)
        for (name, before), (_, after) in zip(
            _by_parameter(operator, x), _by_parameter(operator, y), strict=True
        ):
            flat = before.reshape(-1)
            energy = torch.dot(flat, flat)
            sums[0, position[name]] += energy
            # L = (λ_max/2)(L̃ + I)
            sums[1, position[name]] += (torch.dot(flat, after.reshape(-1)) + energy) / 2
    energy, rough = communicator.sum_(sums).cpu().numpy()
    return np.where(energy > 0, rough, np.nan) / np.where(energy > 0, energy, 1)


def _by_parameter(
    operator: LaplacianOperator, matrix: Matrix
) -> Iterator[tuple[str, torch.Tensor]]:
    """(parameter, its elements that this rank answers for) of a matrix of a bucket."""
    bucket = operator.bucket
    if operator.transposition is not None:
        first = bucket.first_node.tolist()
        for index, parameter in enumerate(bucket.parameters):
            yield parameter.name, matrix.values[first[index] : first[index + 1]]
        return
    for place, view in zip(operator.block.placements, matrix.owned, strict=True):
        index = int(np.searchsorted(bucket.first_node, place.rectangle.node, side="right")) - 1
        yield bucket.parameters[index].name, view
