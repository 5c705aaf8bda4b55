"""What a configuration will take of each rank, from the shapes of a model alone."""

from spectral_ds.planning.costs import Machine
from spectral_ds.planning.flows import Cluster
from spectral_ds.planning.layouts import ENGINES, EngineName, cut_parameters, shard_layout
from spectral_ds.planning.planner import Model, Plan, make_plan
from spectral_ds.planning.stages import PlannedStage, plan_stage

__all__ = [
    "ENGINES",
    "Cluster",
    "EngineName",
    "Machine",
    "Model",
    "Plan",
    "PlannedStage",
    "cut_parameters",
    "make_plan",
    "plan_stage",
    "shard_layout",
]
