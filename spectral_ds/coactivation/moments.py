"""Moments: second moments C = E[xxᵀ] of activations, exact or as a sketch C·Ω.

Source: Tropp, Yurtsever, Udell, Cevher, "Fixed-rank approximation of a positive-semidefinite matrix
from streaming data", arXiv 1706.05736. The sketch is linear: parts that ranks have added up give,
in any division, the same sum.
"""

import torch

from spectral_ds.sharding import Communicator
from spectral_ds.sketches import gaussian_projection

# Columns of a sketch beyond the rank that is asked for, as a share of it.
OVERSAMPLING = 0.5


def sketch_columns(rank: int) -> int:
    """Columns of Ω for so many directions."""
    return rank + max(8, int(OVERSAMPLING * rank))


def is_exact(inputs: int, rank: int) -> bool:
    """Whether C itself is kept: it takes no more than two sketches."""
    return inputs <= 2 * sketch_columns(rank)


class Projections:
    """Ω of each length of vectors, equal on all ranks.

    Args:
        rank: directions that are asked for.
        seed: of the draw.
        device: where it is used.
    """

    def __init__(self, rank: int, seed: int, device: torch.device) -> None:
        self._rank, self._seed, self._device = rank, seed, device
        self._found: dict[int, torch.Tensor | None] = {}

    def of(self, inputs: int) -> torch.Tensor | None:
        """(inputs, columns), float32; None where C itself is kept."""
        if inputs not in self._found:
            omega = None
            if not is_exact(inputs, self._rank):
                columns = sketch_columns(self._rank)
                omega = gaussian_projection(inputs, columns, self._seed)
                assert omega is not None, "a sketch is narrower"
                omega = omega.float().to(self._device)
            self._found[inputs] = omega
        return self._found[inputs]


class Moments:
    """Sums over the vectors that enter one site, float64.

    Args:
        matrices, inputs: of the site.
        omega: (inputs, columns), float32; None: C itself is summed.
        device: where.

    Attributes:
        sums: (matrices, inputs, columns or inputs): Σ x (xᵀΩ).
        squares: (matrices,): Σ ‖x‖².
        count: (matrices,): vectors.
    """

    def __init__(
        self, matrices: int, inputs: int, omega: torch.Tensor | None, device: torch.device
    ) -> None:
        columns = inputs if omega is None else omega.shape[1]
        self.omega = omega
        self.sums = torch.zeros(matrices, inputs, columns, dtype=torch.float64, device=device)
        self.squares = torch.zeros(matrices, dtype=torch.float64, device=device)
        self.count = torch.zeros(matrices, dtype=torch.float64, device=device)

    def add(self, vectors: torch.Tensor, weight: torch.Tensor | None, matrix: int = 0) -> None:
        """Add vectors; no communication. One whose square float32 cannot hold does not count.

        Args:
            vectors: (vectors, inputs), any floating dtype.
            weight: (vectors,), 0 or 1: which of them count; None: all.
            matrix: that they enter.
        """
        device = self.sums.device
        with torch.autocast(device.type, enabled=False):  # the model may be called inside one
            x = vectors.detach().to(device, torch.float32)
            counted = x.square().sum(1).isfinite()
            if weight is not None:
                counted &= weight.to(device, torch.bool)
            x = torch.where(counted[:, None], x, 0.0)
            self.count[matrix] += counted.sum()
            self.sums[matrix] += x.T @ (x if self.omega is None else x @ self.omega)
            self.squares[matrix] += x.square().sum(dtype=torch.float64)

    def sum_over(self, ranks: Communicator) -> None:
        """Add what other ranks have (collective)."""
        for part in (self.sums, self.squares, self.count):
            ranks.sum_(part)
