"""What a configuration will take of each rank, from the shapes of a model alone."""

from spectral_ds.planning.coactivation import PlannedCoactivation
from spectral_ds.planning.costs import Machine
from spectral_ds.planning.flows import Cluster
from spectral_ds.planning.graphs import PlannedGraph, plan_graph
from spectral_ds.planning.layouts import ENGINES, EngineName, cut_parameters, shard_layout
from spectral_ds.planning.planner import Model, Plan, plan_configuration

__all__ = [
    "ENGINES",
    "Cluster",
    "EngineName",
    "Machine",
    "Model",
    "Plan",
    "PlannedCoactivation",
    "PlannedGraph",
    "cut_parameters",
    "plan_configuration",
    "plan_graph",
    "shard_layout",
]
