"""GraphFunction: a + b · h(L) on one bucket after another, by eigenbasis or by series."""

from collections.abc import Sequence

import torch

from spectral_ds.filters.chebyshev import apply_series
from spectral_ds.filters.transfer import Transfer
from spectral_ds.laplacian import LaplacianOperator, Scratch


class GraphFunction:
    """A function of the Laplacian of one graph.

    Args:
        operators: one a bucket.
        transfer: h.
    """

    def __init__(self, operators: Sequence[LaplacianOperator], transfer: Transfer) -> None:
        self.transfer = transfer
        self.operators = operators
        self._made_for: tuple[float, float, int] | None = None
        self._coefficients = torch.empty(0)
        # Each eigenbasis, and h at its eigenvalues, by the basis's id.
        self._bases = {
            id(op.eigenbasis): (op.eigenbasis, transfer.at(op.eigenbasis.values))
            for op in operators
            if op.eigenbasis is not None
        }
        self._matrices: dict[int, torch.Tensor] = {}  # a + b · h(L), by the same

    def set(self, constant: float, factor: float) -> None:
        """Evaluate a + b · h anew if a, b or h have changed; no communication."""
        key = constant, factor, self.transfer.version
        if key == self._made_for:
            return
        self._made_for = key
        for number, (basis, values) in self._bases.items():
            self._matrices[number] = basis.function(constant + factor * values())
        if any(op.is_active and op.eigenbasis is None for op in self.operators):
            coefficients = factor * self.transfer.coefficients()
            coefficients[0] += constant
            self._coefficients = coefficients.float()

    def evaluate(self, operator: LaplacianOperator, scratch: Scratch) -> None:
        """scratch.out ← (a + b · h(L)) scratch.x on own rows; x and y are overwritten."""
        if operator.eigenbasis is not None:
            torch.mm(self._matrices[id(operator.eigenbasis)], scratch.x, out=scratch.out)
        elif operator.is_active:
            apply_series(operator, self._coefficients, scratch)  # boundary rows come, each hop
