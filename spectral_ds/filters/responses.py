"""Responses: what a filter multiplies frequency λ by.

Each takes eigenvalues, shape (n,), float64, and returns h(λ) of the same shape. `degree` is the
degree of a response that is a polynomial, else None.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]


class Response(Protocol):
    """A function of frequency."""

    @property
    def degree(self) -> int | None: ...

    def __call__(self, eigenvalues: Values) -> Values: ...


@dataclass(frozen=True)
class Identity:
    """h(λ) = 1."""

    degree: int | None = 0

    def __call__(self, eigenvalues: Values) -> Values:
        return np.ones_like(eigenvalues)


@dataclass(frozen=True)
class Heat:
    """h(λ) = exp(−τλ): diffusion over the graph for time τ >= 0."""

    tau: float
    degree: int | None = None

    def __call__(self, eigenvalues: Values) -> Values:
        return np.exp(-self.tau * eigenvalues)


@dataclass(frozen=True)
class Tikhonov:
    """h(λ) = 1/(1 + τλ), τ >= 0: Laplacian smoothing (arXiv 1806.06317, eq. 6)."""

    tau: float
    degree: int | None = None

    def __call__(self, eigenvalues: Values) -> Values:
        return 1 / (1 + self.tau * eigenvalues)


@dataclass(frozen=True)
class Window:
    """h(λ) = 1 − (α/2)λ: one step of neighbour averaging (arXiv 2606.30813)."""

    alpha: float
    degree: int | None = 1

    def __call__(self, eigenvalues: Values) -> Values:
        return 1 - self.alpha / 2 * eigenvalues


@dataclass(frozen=True)
class Polynomial:
    """h(λ) = Σ_k c_k λ^k; coefficients from the constant up."""

    coefficients: tuple[float, ...]

    @property
    def degree(self) -> int | None:
        return len(self.coefficients) - 1

    def __call__(self, eigenvalues: Values) -> Values:
        values: Values = np.polynomial.polynomial.polyval(eigenvalues, np.array(self.coefficients))
        return values
