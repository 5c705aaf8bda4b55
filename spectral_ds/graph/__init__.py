"""Nodes and edge families: pure functions of names, shapes and features, no communication."""

from spectral_ds.graph.depth import Depth
from spectral_ds.graph.edges import Edges
from spectral_ds.graph.nodes import (
    NodeKind,
    ParameterNodes,
    Storage,
    match_parameters,
    nodes_touched,
    parameter_nodes,
)
from spectral_ds.graph.pair import Pair, UnknownHeadWidthError
from spectral_ds.graph.ring import Ring
from spectral_ds.graph.similarity import Similarity

EdgeFamily = Depth | Pair | Ring | Similarity

__all__ = [
    "Depth",
    "EdgeFamily",
    "Edges",
    "NodeKind",
    "Pair",
    "ParameterNodes",
    "Ring",
    "Similarity",
    "Storage",
    "UnknownHeadWidthError",
    "match_parameters",
    "nodes_touched",
    "parameter_nodes",
]
