"""The exact eigenbasis of a few nodes: any function of L̃ = 2L/λ_max − I as one matrix product."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """L̃ = U diag(x) Uᵀ on all rows that a rank stores.

    Attributes:
        values: (n,), float64, ascending: x, in [−1, 1].
        vectors: (n, n), float64, on the device: U.
    """

    values: npt.NDArray[np.float64]
    vectors: torch.Tensor

    @classmethod
    def of(cls, matrix: npt.NDArray[np.float64], device: torch.device) -> "Eigenbasis":
        """The eigenbasis of L̃, (n, n), symmetric."""
        values, vectors = np.linalg.eigh(matrix)
        return cls(values, torch.from_numpy(vectors).to(device))

    def function(self, values: torch.Tensor) -> torch.Tensor:
        """U diag(values) Uᵀ, float32, for the function's values at x, (n,), float64."""
        return ((self.vectors * values) @ self.vectors.T).float()
