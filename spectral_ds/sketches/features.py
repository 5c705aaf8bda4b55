"""The features that similarity compares, collected across ranks one scope at a time.

In: this rank's weight fragments. Out: the features of all nodes of the scope, on every rank.
Only sketches travel: each rank projects the columns it owns, and the sum over ranks completes
rows that a shard boundary cuts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from spectral_ds.geometry.buckets import Bucket
from spectral_ds.graph import ParameterNodes
from spectral_ds.sharding import Communicator, Fragment, FragmentsByParameter, by_parameter
from spectral_ds.sketches.projection import gaussian_projection

# Nodes are projected in blocks of at most this many elements (float64: 128 MiB).
BLOCK_ELEMENTS = 2**24

# (parameters of equal width, sketch width) -> (nodes, sketch), float64, equal on all ranks; None
# if there is nothing to compare yet.
FeatureSource = Callable[[Sequence[ParameterNodes], int], torch.Tensor | None]


def no_features(parameters: Sequence[ParameterNodes], sketch_width: int) -> None:
    """Before the first gradient, there is nothing to compare."""


@dataclass(frozen=True)
class WeightFeatures:
    """Features of the reference weights; a call is one all-reduce.

    Args:
        fragments: this rank's.
        weights: their values, flat, in the same order.
        seed: of the random projections.
        communicator: the ranks that share the parameters.
    """

    fragments: Sequence[Fragment]
    weights: Sequence[torch.Tensor]
    seed: int
    communicator: Communicator

    @cached_property
    def _held(self) -> FragmentsByParameter:
        return by_parameter(self.fragments)

    def __call__(self, parameters: Sequence[ParameterNodes], sketch_width: int) -> torch.Tensor:
        bucket = Bucket.of(parameters)
        device = self.communicator.device
        projection = gaussian_projection(bucket.width, sketch_width, self.seed)
        size = bucket.width if projection is None else sketch_width
        projection = None if projection is None else projection.to(device)
        features = torch.zeros(bucket.nodes, size, dtype=torch.float64, device=device)
        for part in bucket.rectangles(self._held):
            values = part.view(self.weights[part.fragment])
            node = part.node
            for block in values.split(max(1, BLOCK_ELEMENTS // part.columns)):
                rows = features[node : node + len(block)]
                add_sketch(rows, block.to(device, torch.float64), part.column, projection)
                node += len(block)
        return self.communicator.sum_(features)


def add_sketch(
    rows: torch.Tensor, values: torch.Tensor, column: int, projection: torch.Tensor | None
) -> None:
    """Add what some columns contribute to the sketches of some nodes.

    Args:
        rows: (nodes, sketch), changed in place.
        values: (nodes, columns): columns `column`, `column` + 1, ... of their signals.
        projection: (width, sketch), or None where signals are kept whole.
    """
    last = column + values.shape[1]
    if projection is None:
        rows[:, column:last] += values
    else:
        rows.addmm_(values, projection[column:last])
