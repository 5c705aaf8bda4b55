"""The features that similarity compares, collected across ranks one scope at a time.

In: this rank's weight fragments. Out: the features of all nodes of the scope, on every rank.
Only sketches travel: each rank projects the columns it owns, and the sum over ranks completes
rows that a shard edge cuts.
"""

from collections.abc import Sequence

import torch

from spectral_ds.graph import ParameterNodes
from spectral_ds.sharding import Communicator, Fragment

# Rows are projected in blocks of at most this many elements (float64: 128 MiB).
BLOCK_ELEMENTS = 2**24


def gather_features(
    parameters: Sequence[ParameterNodes],
    fragments: Sequence[Fragment],
    weights: Sequence[torch.Tensor],
    projection: torch.Tensor | None,
    communicator: Communicator,
) -> torch.Tensor:
    """Features of all nodes of these parameters; one all-reduce.

    Args:
        parameters: parameters of equal width.
        fragments: this rank's fragments.
        weights: their values, flat, in the same order.
        projection: (width, sketch width), float64, or None to keep whole rows.
        communicator: the ranks that share the parameters.

    Returns:
        (nodes, sketch width or width), float64, equal on all ranks.
    """
    width = parameters[0].width
    first_row = 0
    first_row_of = {}
    for parameter in parameters:
        first_row_of[parameter.name] = first_row
        first_row += parameter.rows
    device = communicator.device
    feature_width = width if projection is None else projection.shape[1]
    features = torch.zeros(first_row, feature_width, dtype=torch.float64, device=device)
    projection = None if projection is None else projection.to(device)
    for fragment, values in zip(fragments, weights, strict=True):
        if fragment.parameter not in first_row_of:
            continue
        base = first_row_of[fragment.parameter] * width
        block = max(1, BLOCK_ELEMENTS // width) * width
        start = fragment.start
        for part in values.split(block):
            _add_part(features, part.to(device), base + start, width, projection)
            start += part.numel()
    return communicator.sum_(features)


def _add_part(
    features: torch.Tensor,
    part: torch.Tensor,
    address: int,
    width: int,
    projection: torch.Tensor | None,
) -> None:
    """Add the features of a flat run of elements that begins at an address."""
    first, last = address // width, (address + part.numel() - 1) // width
    rows = torch.zeros(last - first + 1, width, dtype=torch.float64, device=part.device)
    offset = address - first * width
    rows.view(-1)[offset : offset + part.numel()] = part
    features[first : last + 1] += rows if projection is None else rows @ projection
