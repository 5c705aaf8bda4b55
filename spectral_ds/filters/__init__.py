"""Responses h(λ), their Chebyshev series, and the filter that applies one to gradients."""

from spectral_ds.filters.chebyshev import ChebyshevSeries
from spectral_ds.filters.responses import (
    Heat,
    Identity,
    Polynomial,
    Response,
    Tikhonov,
    Window,
)
from spectral_ds.filters.spectral_filter import SpectralFilter

__all__ = [
    "ChebyshevSeries",
    "Heat",
    "Identity",
    "Polynomial",
    "Response",
    "SpectralFilter",
    "Tikhonov",
    "Window",
]
