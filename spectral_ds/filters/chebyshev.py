"""Chebyshev series of a response on [0, λ_max], and its recurrence on shards.

Source: Hammond, Vandergheynst, Gribonval, "Wavelets on graphs via spectral graph theory",
arXiv 0912.3848, section 6.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.polynomial import chebyshev
from scipy.fft import dct

from spectral_ds.filters.responses import Response, Values
from spectral_ds.laplacian import LaplacianOperator

MAX_ORDER = 512
# The error is the largest of this many equally spaced frequencies. Those of coarse steps rule out
# most orders.
ERROR_GRID, COARSE = 10_001, 100


class ToleranceError(ValueError):
    """No Chebyshev series up to MAX_ORDER is close enough to a response."""


@dataclass(frozen=True)
class ChebyshevSeries:
    """h(λ) ≈ Σ_j c_j T_j(x), x = 2λ/λ_max − 1, on [0, λ_max].

    Attributes:
        coefficients: c_0 ... c_order.
        lambda_max: end of the interval.
        error: max |h − series| on the interval.
    """

    coefficients: tuple[float, ...]
    lambda_max: float
    error: float

    @classmethod
    def fit(
        cls,
        response: Response,
        lambda_max: float,
        order: int | str,
        tolerance: float,
    ) -> "ChebyshevSeries":
        """Interpolate the response at Chebyshev points; exact for polynomials.

        Args:
            order: degree of the series, or "best": the least with error <= tolerance.
            tolerance: largest error allowed with `best`.

        Raises:
            ToleranceError: `best` finds no order up to MAX_ORDER.
        """
        grid = np.linspace(-1, 1, ERROR_GRID)
        wanted = response(frequency(grid, lambda_max))

        def interpolated(degree: int) -> Values:
            # T_j at the points are cosines.
            points = chebyshev.chebpts1(degree + 1)[::-1]
            coefficients = np.asarray(dct(response(frequency(points, lambda_max)))) / len(points)
            coefficients[0] /= 2
            return coefficients

        def series(coefficients: Values) -> "ChebyshevSeries":
            found = chebyshev.chebval(grid, coefficients)
            return cls(tuple(coefficients.tolist()), lambda_max, float(abs(found - wanted).max()))

        if isinstance(order, int):
            return series(interpolated(order))
        if response.degree is not None and response.degree <= MAX_ORDER:
            return series(interpolated(response.degree))
        basis = chebyshev.chebvander(grid[::COARSE], MAX_ORDER)
        for degree in range(MAX_ORDER + 1):
            coefficients = interpolated(degree)
            error = float(abs(basis[:, : degree + 1] @ coefficients - wanted[::COARSE]).max())
            if error > tolerance:
                continue
            candidate = series(coefficients)
            if candidate.error <= tolerance:
                return candidate
        raise ToleranceError(
            f"filter.tolerance {tolerance:g} is not reached by any Chebyshev order up to "
            f"{MAX_ORDER} on [0, {lambda_max:g}] (error there {error:.2g}); "
            f"lower filter.tau or raise filter.tolerance"
        )

    @property
    def order(self) -> int:
        return len(self.coefficients) - 1

    def __call__(self, x: Values) -> Values:
        """The series at x in [−1, 1]."""
        return np.asarray(chebyshev.chebval(x, np.array(self.coefficients)))


def frequency(x: Values, lambda_max: float) -> Values:
    """λ of x in [−1, 1]."""
    return lambda_max / 2 * (x + 1)


def apply_series(operator: LaplacianOperator, coefficients: torch.Tensor) -> None:
    """scratch.out ← Σ_j c_j T_j(L̃) X for one bucket; one hop a degree (collective).

    Args:
        operator: of the bucket; its `scratch.x` holds X in its own rows and is overwritten, as is
            `scratch.y`.
        coefficients: (order + 1,): c_0, c_1, ..., on the device, of the scratch's dtype.
    """
    previous, current, out = operator.scratch
    own = operator.block.own
    first, *others = coefficients.unbind()
    torch.mul(previous.values[:own], first, out=out.values)
    for degree, coefficient in enumerate(others, start=1):
        if degree == 1:
            operator.apply(previous, current)
        else:
            operator.apply(current, previous, alpha=2, beta=-1)
            previous, current = current, previous
        out.values.addcmul_(current.values[:own], coefficient)
