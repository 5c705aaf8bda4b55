"""LaplacianOperator: y = L x for one bucket, on the rows of one rank."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array, csr_array

from spectral_ds.geometry.block import LocalBlock
from spectral_ds.geometry.buckets import Bucket
from spectral_ds.graph import Edges
from spectral_ds.laplacian.boundary import BoundaryExchange
from spectral_ds.laplacian.eigenbasis import Eigenbasis
from spectral_ds.laplacian.kernels import Kernel
from spectral_ds.laplacian.transpose import Transposition
from spectral_ds.sharding import Signal


class Matrix(NamedTuple):
    """A matrix of a bucket, with views of its parts: making these anew costs more than copying.

    Made by `LaplacianOperator.matrix`.
    """

    values: torch.Tensor  # (rows, width)
    owned: list[torch.Tensor]  # the elements of this rank's fragments
    received: list[torch.Tensor]  # those of other ranks' fragments, where the bucket is transposed
    answered: list[torch.Tensor]  # what this rank answers for: over ranks, each element once


class Scratch(NamedTuple):
    """The matrices that one bucket is worked on in; what they hold is left from earlier use."""

    x: Matrix  # (stored rows, width)
    y: Matrix  # (stored rows, width)
    out: Matrix  # (own rows, width)


@dataclass(eq=False)
class LaplacianOperator:
    """One hop of a bucket: exchange boundary rows, multiply by the local block.

    The block holds L̃ = 2L/λ_max − I, whose spectrum lies in [−1, 1] as Chebyshev polynomials
    want it; `apply` gives L̃ x, and L x = (λ_max/2)(L̃ x + x).

    Attributes:
        bucket: what is multiplied.
        block: which rows are stored where.
        kernel: the multiply kernel with the block; None if this rank stores no row of the bucket.
        exchange: the boundary exchange of each hop; None if no rank needs any.
        transposition: instead of it, how the signal comes and goes; None if rows stay.
        eigenbasis: of L̃ on all stored rows, where paths need no exchange; else None.
        scratch: where it is worked on, in memory that the operators of a graph share.
    """

    bucket: Bucket
    block: LocalBlock
    kernel: Kernel | None = None
    exchange: BoundaryExchange | None = None
    transposition: Transposition | None = None
    eigenbasis: Eigenbasis | None = None
    scratch: Scratch = field(init=False, repr=False)

    @property
    def is_active(self) -> bool:
        """Whether this rank has anything to do in a hop."""
        return self.kernel is not None or self.exchange is not None

    def matrix(self, values: torch.Tensor) -> Matrix:
        """A matrix of (own rows or more, width) that the operator can work on."""
        owned = self.block.owned_views(values)
        received = [] if self.transposition is None else self.transposition.places(values)
        is_whole = self.transposition is not None or self.block.is_whole
        return Matrix(values, owned, received, [values[: self.block.own]] if is_whole else owned)

    def load(self, signal: Signal, x: Matrix, minus: Signal | None = None) -> None:
        """x ← the signal's own elements (collective if there is a transposition).

        Args:
            signal: this rank's fragments, flat, any floating dtype; None counts as zeros.
            x: (stored rows, width).
            minus: what is subtracted from them; see `LocalBlock.load`.
        """
        if self.transposition is None:
            self.block.load(signal, x.owned, minus)
        else:
            self.transposition.load(signal, x.owned, x.received, minus)

    def apply(self, x: Matrix, out: Matrix, alpha: float = 1.0, beta: float = 0.0) -> None:
        """out ← alpha · L̃ x + beta · out on own rows (collective if there is an exchange).

        Args:
            x: (stored rows, width); its boundary rows are overwritten.
            out: (own rows or more, width); with beta = 0 its old values are ignored.
        """
        if self.exchange is not None:
            self.exchange.run(x.values)
        if self.kernel is not None and x.values.numel() > 0:
            self.kernel.multiply(x.values, out.values[: self.block.own], alpha, beta)


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
