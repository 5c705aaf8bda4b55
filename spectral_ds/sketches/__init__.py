"""A few random projections of every node's signal, in place of the signal."""

from spectral_ds.sketches.features import FeatureSource, WeightFeatures, no_features
from spectral_ds.sketches.node_sketches import Sketches
from spectral_ds.sketches.projection import gaussian_projection, sketch_size

__all__ = [
    "FeatureSource",
    "Sketches",
    "WeightFeatures",
    "gaussian_projection",
    "no_features",
    "sketch_size",
]
