"""Nodes and edge families: pure functions of names, shapes and features, no communication."""

from spectral_ds.graph.depth import Depth
from spectral_ds.graph.edges import Edges
from spectral_ds.graph.nodes import ParameterNodes, match_parameters
from spectral_ds.graph.similarity import Similarity

EdgeFamily = Depth | Similarity

__all__ = ["Depth", "EdgeFamily", "Edges", "ParameterNodes", "Similarity", "match_parameters"]
