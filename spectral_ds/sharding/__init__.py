"""Who owns which part of which parameter, and how ranks talk.

Knows nothing of engines or graphs; everything else in the package speaks in its words.
"""

from spectral_ds.sharding.collectives import Communicator
from spectral_ds.sharding.fragments import (
    Fragment,
    FragmentsByParameter,
    ShardLayout,
    ShardLayoutError,
    Signal,
    by_parameter,
)
from spectral_ds.sharding.norms import squared_norm_of

__all__ = [
    "Communicator",
    "Fragment",
    "FragmentsByParameter",
    "ShardLayout",
    "ShardLayoutError",
    "Signal",
    "by_parameter",
    "squared_norm_of",
]
