"""Multiply kernels: out ← alpha · A x + beta · out for one block A.

Kernels of one interface, equal in result: torch-sparse, torch's native CSR, torch's embedding bag,
and a dense one for the few nodes of depth paths.
"""

import math
import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
from scipy.sparse import csr_array
from torch.nn.functional import embedding_bag

from spectral_ds.console.messages import logger
from spectral_ds.sharding import Communicator

KernelName = Literal["best", "torch_sparse", "torch_csr", "embedding_bag"]

INSTALL_TORCH_SPARSE = (
    "install it after torch, and for CUDA where its compiler is: "
    "pip install --no-build-isolation torch-scatter torch-sparse"
)


class KernelUnavailableError(RuntimeError):
    """The configured kernel cannot be used here."""


class Kernel(Protocol):
    """One block; its dtype is that of the signals."""

    name: str

    def multiply(self, x: torch.Tensor, out: torch.Tensor, alpha: float, beta: float) -> None:
        """out ← alpha · A x + beta · out; x (columns of A, width), out (rows of A, width)."""


class TorchCSRKernel:
    """torch's native CSR product, in place."""

    name = "torch_csr"

    def __init__(self, block: csr_array, device: torch.device, dtype: torch.dtype) -> None:
        index_dtype = np.int32 if max(block.nnz, *block.shape) < 2**31 else np.int64
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            self.matrix = torch.sparse_csr_tensor(
                torch.from_numpy(block.indptr.astype(index_dtype)),
                torch.from_numpy(block.indices.astype(index_dtype)),
                torch.from_numpy(block.data).to(dtype),
                size=block.shape,
                device=device,
                check_invariants=True,
            )

    def multiply(self, x: torch.Tensor, out: torch.Tensor, alpha: float, beta: float) -> None:
        out.addmm_(self.matrix, x, beta=beta, alpha=alpha)


class TorchSparseKernel:
    """torch-sparse's product; it allocates its result."""

    name = "torch_sparse"

    def __init__(self, block: csr_array, device: torch.device, dtype: torch.dtype) -> None:
        matrix = _torch_sparse().SparseTensor(
            rowptr=torch.from_numpy(block.indptr.astype(np.int64)),
            col=torch.from_numpy(block.indices.astype(np.int64)),
            value=torch.from_numpy(block.data).to(dtype),
            sparse_sizes=block.shape,
            is_sorted=True,
            trust_data=True,
        )
        self.matrix = matrix.to(device)

    def multiply(self, x: torch.Tensor, out: torch.Tensor, alpha: float, beta: float) -> None:
        product = _torch_sparse().matmul(self.matrix, x)
        if beta == 0:
            torch.mul(product, alpha, out=out)
        else:
            out.mul_(beta).add_(product, alpha=alpha)


class EmbeddingBagKernel:
    """torch's sum of weighted embeddings: bags are rows of A, embeddings rows of x.

    On x86 CPUs it runs FBGEMM's code, which is made for the width. It allocates its result.
    """

    name = "embedding_bag"

    def __init__(self, block: csr_array, device: torch.device, dtype: torch.dtype) -> None:
        index_dtype = np.int32 if max(block.nnz, *block.shape) < 2**31 else np.int64
        self._columns = torch.from_numpy(block.indices.astype(index_dtype)).to(device)
        self._starts = torch.from_numpy(block.indptr[:-1].astype(index_dtype)).to(device)
        self._weights = {1.0: torch.from_numpy(block.data).to(device, dtype)}

    def multiply(self, x: torch.Tensor, out: torch.Tensor, alpha: float, beta: float) -> None:
        if alpha not in self._weights:  # there are few
            self._weights[alpha] = self._weights[1.0] * alpha
        weights = self._weights[alpha]
        product = embedding_bag(
            self._columns, x, self._starts, mode="sum", per_sample_weights=weights
        )
        if beta == 0:
            out.copy_(product)
        else:
            torch.add(product, out, alpha=beta, out=out)


class DenseKernel:
    """A dense block in a plain matrix product."""

    name = "dense"

    def __init__(self, block: csr_array, device: torch.device, dtype: torch.dtype) -> None:
        self.matrix = torch.from_numpy(block.toarray()).to(device, dtype)

    def multiply(self, x: torch.Tensor, out: torch.Tensor, alpha: float, beta: float) -> None:
        out.addmm_(self.matrix, x, beta=beta, alpha=alpha)


KERNELS: dict[str, Callable[[csr_array, torch.device, torch.dtype], Kernel]] = {
    "torch_csr": TorchCSRKernel,
    "torch_sparse": TorchSparseKernel,
    "embedding_bag": EmbeddingBagKernel,
    "dense": DenseKernel,
}


@cache
def _torch_sparse() -> Any:
    import torch_sparse

    return torch_sparse


def multiply_tiny(name: str, device: torch.device) -> None:
    """Multiply a tiny matrix on a device, whose product is known.

    Raises:
        RuntimeError: the product is wrong; or whatever an installation raises that is broken, or
            was built without this kind of device.
    """
    matrix = csr_array(np.array([[2.0, -1.0, 0.0], [-1.0, 0.0, 3.0]]))
    x = torch.arange(6, dtype=torch.float32, device=device).view(3, 2)
    wanted = 2 * matrix.toarray() @ x.cpu().numpy() + 1
    out = torch.ones(2, 2, dtype=torch.float32, device=device)
    with _no_autocast(device):
        KERNELS[name](matrix, device, torch.float32).multiply(x, out, 2.0, 1.0)
    if not np.allclose(out.cpu().numpy(), wanted):
        raise RuntimeError(f"gives a wrong product on {device.type}")


def _no_autocast(device: torch.device) -> torch.autocast:
    """Kernels are tried as they multiply in a step, also inside a torch.autocast."""
    return torch.autocast(device.type, enabled=False)


def require_kernel(name: KernelName, device: torch.device, says: bool = True) -> None:
    """Check that a configured kernel can be used; `best` only warns, once.

    Args:
        device: where it will multiply.
        says: whether this rank is the one that warns.

    Raises:
        KernelUnavailableError: the kernel does not multiply there.
    """
    reason = _why_not("torch_sparse" if name == "best" else name, device)
    if not reason:
        return
    if name != "best":
        install = f"{INSTALL_TORCH_SPARSE}, or " if name == "torch_sparse" else ""
        raise KernelUnavailableError(
            f"operator.kernel is {name!r}, which does not work on {device.type} ({reason}); "
            f"{install}set operator.kernel to 'best' or 'torch_csr'"
        )
    if says:
        _warn_once(
            f"torch_sparse does not work on {device.type} ({reason}): using torch's own kernels; "
            f"to have both, {INSTALL_TORCH_SPARSE}"
        )


def _why_not(name: str, device: torch.device) -> str:
    """Why a kernel does not work on a device; empty if it does."""
    try:
        multiply_tiny(name, device)
    except (ImportError, OSError, RuntimeError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def choose_kernel(name: KernelName, block: csr_array, width: int, everyone: Communicator) -> str:
    """The name of the kernel to use (collective for `best`).

    `best` times the sparse kernels that work on the ranks' real blocks, and takes the fastest in
    sum, on all ranks alike: replicas of a gradient must not differ in the last bit.

    Args:
        block: A, float64, indices sorted.
        width: columns of the signals it will multiply.
        everyone: all ranks; its device is the kernel's.
    """
    if name != "best":
        return name
    device, dtype = everyone.device, torch.float32
    candidates = ["torch_csr", "torch_sparse"]
    if device.type == "cpu":
        candidates.append("embedding_bag")
    seconds = torch.zeros(len(candidates), dtype=torch.float64, device=device)
    for index, candidate in enumerate(candidates):
        if _why_not(candidate, device):
            seconds[index] = math.inf
        elif block.shape[0] > 0 and width > 0:
            x = torch.zeros(block.shape[1], width, dtype=dtype, device=device)
            out = torch.zeros(block.shape[0], width, dtype=dtype, device=device)
            with _no_autocast(device):
                seconds[index] = _seconds(KERNELS[candidate](block, device, dtype), x, out)
    return candidates[int(everyone.sum_(seconds).argmin())]


def _seconds(kernel: Kernel, x: torch.Tensor, out: torch.Tensor, repeats: int = 3) -> float:
    """The fastest of a few multiplies, after one to warm up."""
    fastest = float("inf")
    for repeat in range(repeats + 1):
        _synchronize(x.device)
        start = time.perf_counter()
        kernel.multiply(x, out, 1.0, 1.0)
        _synchronize(x.device)
        if repeat > 0:
            fastest = min(fastest, time.perf_counter() - start)
    return fastest


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
