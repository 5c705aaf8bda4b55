"""The graphs of a configuration: choosing what they are made of, and what acts by each."""

from spectral_ds.stack.activations import graphs_of, sites_among
from spectral_ds.stack.choices import (
    GraphChoice,
    choose_graphs,
    choose_parameters,
    edge_families,
)
from spectral_ds.stack.coactivation_graph import CoactivationGraph
from spectral_ds.stack.modules import ModelFacts, facts_of
from spectral_ds.stack.newcomers import Newcomers
from spectral_ds.stack.stack import Stack
from spectral_ds.stack.stacked_graph import StackedGraph

__all__ = [
    "CoactivationGraph",
    "GraphChoice",
    "ModelFacts",
    "Newcomers",
    "Stack",
    "StackedGraph",
    "choose_graphs",
    "choose_parameters",
    "edge_families",
    "facts_of",
    "graphs_of",
    "sites_among",
]
