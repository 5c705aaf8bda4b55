"""GraphFunction: a + b · h(L) on one bucket after another, by eigenbasis or by series."""

from collections.abc import Sequence

import torch

from spectral_ds.filters.chebyshev import apply_series
from spectral_ds.filters.transfer import Transfer
from spectral_ds.laplacian import LaplacianOperator, Shipment
from spectral_ds.laplacian.eigenbasis import Eigenbasis


class GraphFunction:
    """A function of the Laplacian of one graph.

    Args:
        shipments: the operators of the buckets, together as their signals travel.
        transfer: h.

    Attributes:
        operators: of all shipments.
    """

    def __init__(self, shipments: Sequence[Shipment], transfer: Transfer) -> None:
        self.transfer, self.shipments = transfer, shipments
        self.operators = [operator for shipment in shipments for operator in shipment.operators]
        self._made_for: tuple[float, float, int] | None = None
        self._coefficients = torch.empty(0, dtype=torch.float32, device="cpu")
        # h at the eigenvalues of each eigenbasis, and a + b · h(L) by it; slices of columns share.
        bases = dict.fromkeys(op.eigenbasis for op in self.operators if op.eigenbasis is not None)
        self._values = {basis: transfer.at(basis.values) for basis in bases}
        self._matrices: dict[Eigenbasis, torch.Tensor] = {}

    def set(self, constant: float, factor: float) -> None:
        """Evaluate a + b · h anew if a, b or h have changed; no communication."""
        key = constant, factor, self.transfer.version
        if key == self._made_for:
            return
        self._made_for = key
        for basis, values in self._values.items():
            self._matrices[basis] = basis.function(constant + factor * values())
        if any(op.is_active and op.eigenbasis is None for op in self.operators):
            coefficients = factor * self.transfer.coefficients()
            coefficients[0] += constant
            self._coefficients = coefficients.float()

    def evaluate(self, operator: LaplacianOperator) -> None:
        """The operator's scratch.out ← (a + b · h(L)) scratch.x on own rows.

        Its scratch.x and scratch.y are overwritten.
        """
        if operator.eigenbasis is not None:
            x, _, out = operator.scratch
            torch.mm(self._matrices[operator.eigenbasis], x.values, out=out.values)
        elif operator.is_active:
            apply_series(operator, self._coefficients)  # boundary rows come, each hop
