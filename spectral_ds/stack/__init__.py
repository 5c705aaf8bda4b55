"""The graphs of a configuration: choosing what they are made of, and what acts on each."""

from spectral_ds.stack.choices import (
    GraphChoice,
    choose_graphs,
    choose_parameters,
    edge_families,
    head_width_of,
)
from spectral_ds.stack.stacked_graph import Stage

__all__ = [
    "GraphChoice",
    "Stage",
    "choose_graphs",
    "choose_parameters",
    "edge_families",
    "head_width_of",
]
