"""LaplacianOperator: y = L x on shards = local blocks + what other ranks bring."""

from spectral_ds.laplacian.kernels import KernelName, KernelUnavailableError, require_kernel
from spectral_ds.laplacian.operator import LaplacianOperator
from spectral_ds.laplacian.packing import Exchange, ExchangeName
from spectral_ds.laplacian.parameter_graph import Group, ParameterGraph
from spectral_ds.laplacian.plan import OperatorPlan, plan_operators
from spectral_ds.laplacian.work import Work
from spectral_ds.laplacian.workspace import Scratch, Workspace
from spectral_ds.sketches.features import FeatureSource, WeightFeatures

__all__ = [
    "Exchange",
    "ExchangeName",
    "FeatureSource",
    "Group",
    "KernelName",
    "KernelUnavailableError",
    "LaplacianOperator",
    "OperatorPlan",
    "ParameterGraph",
    "Scratch",
    "WeightFeatures",
    "Work",
    "Workspace",
    "plan_operators",
    "require_kernel",
]
