"""Subspace functions: G = c I + P M Pᵀ, a function of one or two co-activation graphs.

Y = X·G filters the rows of X. With R of inputs to keep alone, G = h(R). With T of inputs to learn
as well, G = T^½ h(T^−½ R T^−½) T^−½, a response of how active a direction is in what is kept,
relative to what is learned; for `tikhonov` that is T(T + τR)⁻¹, the minimizer of
E_learn‖(X − Y)x‖² + τ·E_keep‖Yx‖² (RegMean, arXiv 2212.09849, with the pretrained model as one of
two).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from spectral_ds.coactivation.one_thread import one_thread
from spectral_ds.coactivation.spectrum import Spectrum, Values

# h at frequencies, (n,) float64.
Response = Callable[[Values], Values]

# Added to R and T, whose mean eigenvalue is 1: a direction that neither of them has keeps ratio 1.
RIDGE = 1e-6
# Directions of the two graphs that are nearer than this are the same.
DEPENDENT = 1e-6


@dataclass(frozen=True, eq=False)
class SubspaceFunction:
    """G = c I + P M Pᵀ.

    Attributes:
        constant: c.
        basis: (n, k), float64, orthonormal: P.
        core: (k, k), float64: M.
    """

    constant: float
    basis: Values
    core: Values

    def matrix(self) -> Values:
        """G, (n, n): for study and tests of small layers."""
        whole = self.basis @ self.core @ self.basis.T
        return np.asarray(whole + self.constant * np.eye(len(self.basis)))


@one_thread
def function_of(response: Response, keep: Spectrum, learn: Spectrum | None) -> SubspaceFunction:
    """G of a response.

    Args:
        response: h.
        keep: R.
        learn: T; None: I.
    """
    if learn is None:
        constant = float(response(np.array([keep.rest]))[0])
        core = np.diag(response(keep.values) - constant)
        return SubspaceFunction(constant, keep.vectors.astype(np.float64), core)
    basis = joint_basis((keep, learn))
    constant = float(response(np.array([(keep.rest + RIDGE) / (learn.rest + RIDGE)]))[0])
    r, t = within(basis, keep), within(basis, learn)
    # (R, R + T) have common eigenvectors: R v = ρ (R + T) v with ρ in (0, 1), R/T = ρ/(1 − ρ).
    rho, vectors = scipy.linalg.eigh(r, r + t)
    rho = np.clip(rho, 0, 1)
    ratio = rho / np.maximum(1 - rho, np.finfo(np.float64).tiny)
    # G = T^½ h T^−½ with respect to them; (R + T)-orthonormal vectors: V⁻ᵀ = (R + T) V.
    core = ((r + t) @ vectors * response(ratio)) @ vectors.T
    return SubspaceFunction(constant, basis, core - constant * np.eye(basis.shape[1]))


def joint_basis(spectra: Sequence[Spectrum]) -> Values:
    """An orthonormal basis of all graphs' directions, (n, k), float64."""
    together = np.concatenate([each.vectors for each in spectra], axis=1).astype(np.float64)
    basis, singular, _ = np.linalg.svd(together, full_matrices=False)
    return np.ascontiguousarray(basis[:, singular > DEPENDENT * singular[0]])


def within(basis: Values, spectrum: Spectrum) -> Values:
    """PᵀAP + ε, A a graph whose directions all lie in P."""
    inside = basis.T @ spectrum.vectors
    whole = inside * (spectrum.values - spectrum.rest) @ inside.T
    return np.asarray(whole + (spectrum.rest + RIDGE) * np.eye(basis.shape[1]))
