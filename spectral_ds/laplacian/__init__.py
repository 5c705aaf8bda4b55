"""LaplacianOperator: y = L x on shards = local blocks + what other ranks bring."""

from spectral_ds.laplacian.agreement import GraphsDifferError, require_one_graph
from spectral_ds.laplacian.kernels import KernelName, KernelUnavailableError, require_kernel
from spectral_ds.laplacian.operator import LaplacianOperator, Matrix, Scratch
from spectral_ds.laplacian.packing import Exchange, ExchangeName
from spectral_ds.laplacian.parameter_graph import Group, ParameterGraph
from spectral_ds.laplacian.plan import OperatorPlan, plan_on_node_signals, plan_operators
from spectral_ds.laplacian.shipment import Shipment
from spectral_ds.laplacian.work import Work

__all__ = [
    "Exchange",
    "ExchangeName",
    "GraphsDifferError",
    "Group",
    "KernelName",
    "KernelUnavailableError",
    "LaplacianOperator",
    "Matrix",
    "OperatorPlan",
    "ParameterGraph",
    "Scratch",
    "Shipment",
    "Work",
    "plan_on_node_signals",
    "plan_operators",
    "require_kernel",
    "require_one_graph",
]
