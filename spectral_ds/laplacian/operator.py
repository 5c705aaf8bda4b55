"""LaplacianOperator: y = L x for one bucket, on the rows of one rank."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array, csr_array

from spectral_ds.graph import Edges
from spectral_ds.laplacian.block import LocalBlock
from spectral_ds.laplacian.exchange import BoundaryExchange
from spectral_ds.laplacian.kernels import Kernel


@dataclass
class LaplacianOperator:
    """One hop of a bucket: exchange boundary rows, multiply by the local block.

    The block holds L̃ = 2L/λ_max − I, whose spectrum lies in [−1, 1] as Chebyshev polynomials
    want it; `apply` gives L̃ x, and L x = (λ_max/2)(L̃ x + x).

    Attributes:
        block: which rows are stored where.
        exchange: the boundary exchange, or None if the bucket needs none on any rank.
        kernel: the multiply kernel with the block; None if this rank owns no row of the bucket.
    """

    block: LocalBlock
    exchange: BoundaryExchange | None
    kernel: Kernel | None

    def apply(
        self, x: torch.Tensor, out: torch.Tensor, alpha: float = 1.0, beta: float = 0.0
    ) -> None:
        """out ← alpha · L̃ x + beta · out on own rows (collective if there is an exchange).

        Args:
            x: (stored rows, width), float32; its boundary rows are overwritten.
            out: (own rows or more, width), float32; with beta = 0 its old values are ignored.
        """
        if self.exchange is not None:
            self.exchange.run(x)
        if self.kernel is not None:
            self.kernel.multiply(x, out[: self.block.own], alpha, beta)

    @property
    def elements_sent(self) -> int:
        """Elements that this rank sends a hop."""
        return 0 if self.exchange is None else self.exchange.elements_sent


def laplacian_rows(
    edges: Edges, degree: npt.NDArray[np.float64], rows: npt.NDArray[np.int64], normalized: bool
) -> coo_array:
    """The rows of L that one rank owns a part of.

    Args:
        edges: all edges from these rows, sources and targets global.
        degree: (nodes,): of every node of the bucket.
        rows: sorted global row numbers.
        normalized: L = I − D^(−1/2) W D^(−1/2), rows of isolated nodes 0; else L = D − W.

    Returns:
        Shape (nodes, nodes), float64, global indices; other rows are empty.
    """
    if normalized:
        root = np.sqrt(np.where(degree > 0, degree, 1))
        values = -edges.weight / (root[edges.source] * root[edges.target])
        diagonal = (degree[rows] > 0).astype(np.float64)
    else:
        values = -edges.weight
        diagonal = degree[rows]
    nodes = len(degree)
    return coo_array(
        (
            np.concatenate((values, diagonal)),
            (np.concatenate((edges.source, rows)), np.concatenate((edges.target, rows))),
        ),
        shape=(nodes, nodes),
    )


def chebyshev_block(laplacian: coo_array, block: LocalBlock, lambda_max: float) -> csr_array:
    """The local block of L̃ = 2L/λ_max − I; shape (own rows, stored rows)."""
    row, column = laplacian.row.astype(np.int64), laplacian.col.astype(np.int64)
    values = laplacian.data * (2 / lambda_max) - (row == column)
    local = csr_array(
        (values, (block.local_rows(row), block.local_rows(column))),
        shape=(block.own, block.stored),
    )
    local.sort_indices()
    return local
