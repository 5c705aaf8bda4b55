"""y = L x on shards: local blocks (torch-sparse) and the exchange of boundary rows.

In: parameters, shard layout, edge families, weights. Out: a `ParameterGraph` of buckets, each
with its `LaplacianOperator`.
"""

from spectral_ds.laplacian.buckets import Bucket, make_buckets
from spectral_ds.laplacian.kernels import KernelName, KernelUnavailableError, require_kernel
from spectral_ds.laplacian.operator import LaplacianOperator
from spectral_ds.laplacian.parameter_graph import ParameterGraph

__all__ = [
    "Bucket",
    "KernelName",
    "KernelUnavailableError",
    "LaplacianOperator",
    "ParameterGraph",
    "make_buckets",
    "require_kernel",
]
