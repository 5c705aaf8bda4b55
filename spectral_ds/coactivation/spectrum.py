"""The spectrum of a co-activation graph: its most active directions, all others by their mean.

Nodes are the inputs of a layer; the operator is A = n · C / tr C with C = E[xxᵀ], so that the mean
eigenvalue is 1. An eigenvalue a says how active its direction is, 1 being average.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from spectral_ds.coactivation.moments import Moments
from spectral_ds.coactivation.one_thread import one_thread

Values: TypeAlias = npt.NDArray[np.float64]

# Of the norm of a sketch; its parts are products in single precision.
SHIFT = 1e-6
# Directions of less than this share of the largest eigenvalue are rounding.
DEPENDENT = 1e-12
# Of a sum of eigenvalues.
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A ≈ Σ_i a_i u_i u_iᵀ + ā (I − Σ_i u_i u_iᵀ).

    Attributes:
        values: (k,), float64, descending: a_i.
        vectors: (n, k), float32, orthonormal: u_i.
        rest: ā: the mean of the other eigenvalues; 1 where there are none.
    """

    values: Values
    vectors: npt.NDArray[np.float32]
    rest: float

    @property
    def inputs(self) -> int:
        return len(self.vectors)

    def of_rank(self, rank: int) -> "Spectrum":
        """The same with the most active directions only."""
        if rank >= len(self.values):
            return self
        return spectrum_of(self.values[:rank], self.vectors[:, :rank])

    def holding(self, share: float) -> int | None:
        """How many of the most active directions hold this share of the activity.

        None: more than are known.
        """
        held = np.cumsum(self.values) / self.inputs
        found = int(np.searchsorted(held, share * (1 - ROUNDING))) + 1
        return found if found <= len(held) else None

    def matrix(self) -> Values:
        """A, (n, n): for study and tests of small layers."""
        basis = self.vectors.astype(np.float64)
        whole = basis * (self.values - self.rest) @ basis.T
        return np.asarray(whole + self.rest * np.eye(self.inputs))


def spectrum_of(values: Values, vectors: npt.NDArray[np.float32]) -> Spectrum:
    """The spectrum of these directions; the trace of A is the number of inputs."""
    inputs, known = vectors.shape
    others = inputs - known
    rest = max(float(inputs - values.sum()), 0.0) / others if others else 1.0
    return Spectrum(values, vectors, rest)


@one_thread
def most_active(moments: Moments, matrix: int, rank: int) -> Spectrum | None:
    """The `rank` most active directions of a site's matrix; None if nothing entered it.

    Args:
        moments: summed over ranks.
    """
    total = float(moments.squares[matrix])
    if not total > 0:
        return None
    sums = moments.sums[matrix].cpu().numpy()
    if moments.omega is None:
        values, vectors = np.linalg.eigh((sums + sums.T) / 2)
        values, vectors = values[::-1], vectors[:, ::-1]
    else:
        values, vectors = _nystrom(sums, moments.omega.double().cpu().numpy())
    values = np.maximum(values, 0) * (len(sums) / total)
    kept = max(1, min(rank, int((values > DEPENDENT * values[0]).sum())))
    return spectrum_of(values[:kept].copy(), vectors[:, :kept].astype(np.float32))


def _nystrom(sums: Values, omega: Values) -> tuple[Values, Values]:
    """Eigenpairs, largest first, of the Nyström approximation S (ΩᵀS)⁺ Sᵀ of C from S = C·Ω.

    Source: arXiv 1706.05736, algorithm 3: a shift makes the core positive definite.
    """
    shift = SHIFT * float(np.linalg.norm(sums))
    shifted = sums + shift * omega
    core = omega.T @ shifted
    root = np.linalg.cholesky((core + core.T) / 2)
    vectors, singular, _ = np.linalg.svd(np.linalg.solve(root, shifted.T).T, full_matrices=False)
    return np.maximum(singular**2 - shift, 0), vectors


def largest(spectra: Sequence[Spectrum]) -> float:
    """The largest eigenvalue of several graphs; 1 of none."""
    return max((float(spectrum.values[0]) for spectrum in spectra), default=1.0)
