"""Transfer functions: a response as the filter evaluates it, by series or at eigenvalues.

`FixedTransfer` is set once; so is `ExactTransfer`, where eigenvectors are known. `BandTransfer` has
a gain for each band of frequency, which may change from step to step.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.polynomial import chebyshev

from spectral_ds.filters.chebyshev import ChebyshevSeries, ToleranceError, frequency
from spectral_ds.filters.responses import Response, Values
from spectral_ds.spectrum import band_coefficients

# On depth paths the exact eigenbasis and the series must agree to float32.
PATH_TOLERANCE = 1e-7


class Transfer(Protocol):
    """h, on the device.

    Attributes:
        hops: order of its series: products with L that one filter takes; None if it has no series,
            and can only be evaluated at eigenvalues.
        error: largest difference of the series from the response.
        is_identity: whether h = 1 everywhere, always.
        version: changes when h does.
    """

    error: float
    is_identity: bool

    @property
    def hops(self) -> int | None: ...

    @property
    def version(self) -> int: ...

    def coefficients(self) -> torch.Tensor:
        """Chebyshev coefficients, (hops + 1,), float64."""

    def at(self, x: Values) -> Callable[[], torch.Tensor]:
        """Gives h, as it is when called, at x = 2λ/λ_max − 1; float64."""

    def describe(self) -> str:
        """How it is evaluated, for people."""


class FixedTransfer:
    """A response that does not change.

    Args:
        response: h.
        lambda_max: end of the spectrum it acts on.
        only_paths: whether the graph consists of depth paths. There, h is evaluated exactly where
            rows need not be exchanged, so that the series must agree with it to float32; where none
            does, h has no series.
        order, tolerance: of the series, see `ChebyshevSeries.fit`.
        device: of the coefficients.

    Raises:
        ToleranceError: `order` is "best", no series is within the tolerance, and there are not only
            paths.
    """

    version = 0

    def __init__(
        self,
        response: Response,
        lambda_max: float,
        only_paths: bool,
        order: int | str,
        tolerance: float,
        device: torch.device,
    ) -> None:
        self._response, self._lambda_max, self._device = response, lambda_max, device
        self._coefficients: torch.Tensor | None = None
        self._is_exact = order == "best"
        if isinstance(order, int) and response.degree is not None:
            order = min(order, response.degree)  # higher coefficients are 0 up to rounding
        self._series: ChebyshevSeries | None = None
        if only_paths:
            tolerance = min(tolerance, PATH_TOLERANCE)
        try:
            self._series = ChebyshevSeries.fit(response, lambda_max, order, tolerance)
        except ToleranceError:
            if not only_paths:
                raise
        self.hops: int | None = None
        self.error, self.is_identity = 0.0, False
        if self._series is not None:
            found = self._series.coefficients
            self.hops, self.error = self._series.order, self._series.error
            self.is_identity = found == (1.0,)
            self._coefficients = torch.tensor(found, dtype=torch.float64, device=device)

    def coefficients(self) -> torch.Tensor:
        assert self._coefficients is not None, "who needs a series has asked for its hops"
        return self._coefficients

    def at(self, x: Values) -> Callable[[], torch.Tensor]:
        if self._is_exact or self._series is None:
            found = self._response(np.maximum(frequency(x, self._lambda_max), 0))
        else:
            found = self._series(x)
        values = torch.from_numpy(found).to(self._device)
        return lambda: values

    def describe(self) -> str:
        if self._series is None:
            return "by exact eigenbasis"
        return f"of Chebyshev order {self.hops} (error <= {self.error:.1e})"


class ExactTransfer:
    """A response at eigenvalues that are known; it has no series, and needs none.

    Args:
        response: h.
        lambda_max: end of the spectrum it acts on.
        device: of the values.
    """

    version = 0
    error = 0.0
    hops = None

    def __init__(self, response: Response, lambda_max: float, device: torch.device) -> None:
        self._response, self._lambda_max, self._device = response, lambda_max, device
        self.is_identity = response.degree == 0 and response(np.zeros(1)) == 1

    def coefficients(self) -> torch.Tensor:
        raise AssertionError("who needs a series has asked for its hops")

    def at(self, x: Values) -> Callable[[], torch.Tensor]:
        found = self._response(np.maximum(frequency(x, self._lambda_max), 0))
        values = torch.from_numpy(found).to(self._device)
        return lambda: values

    def describe(self) -> str:
        return "by exact eigenbasis"


class BandTransfer:
    """A gain for each band, smooth at its edges (Jackson-damped): a polynomial by definition.

    Args:
        edges: ascending, from 0 to 1, as shares of [0, λ_max]; (bands + 1,).
        gains: gives (bands,), float64, on the device.
        version: gives a number that changes when the gains do.
        order: degree of the polynomial.
        device: of the coefficients.
    """

    error = 0.0
    is_identity = False

    def __init__(
        self,
        edges: Sequence[float] | Values,
        gains: Callable[[], torch.Tensor],
        version: Callable[[], int],
        order: int,
        device: torch.device,
    ) -> None:
        self._gains, self._version, self._device = gains, version, device
        self._bands = torch.from_numpy(band_coefficients(edges, order + 1)).to(device)
        self.hops = order

    @property
    def version(self) -> int:
        return self._version()

    def coefficients(self) -> torch.Tensor:
        return self._gains() @ self._bands

    def at(self, x: Values) -> Callable[[], torch.Tensor]:
        polynomials = torch.from_numpy(chebyshev.chebvander(x, self.hops)).to(self._device)
        return lambda: polynomials @ self.coefficients()

    def describe(self) -> str:
        return f"by bands, of Chebyshev order {self.hops}"
