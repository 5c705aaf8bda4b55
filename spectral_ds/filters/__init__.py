"""Responses h(λ), how they are evaluated, and the filter that applies them to signals."""

from spectral_ds.filters.adaptive import whiten_gains, wiener_gains
from spectral_ds.filters.chebyshev import MAX_ORDER, ChebyshevSeries, ToleranceError
from spectral_ds.filters.regularizer import GraphPenalty, Penalty, Reference, Regularizer
from spectral_ds.filters.rescale import NormKeeper
from spectral_ds.filters.responses import (
    Heat,
    Identity,
    Polynomial,
    Response,
    Tikhonov,
    Window,
)
from spectral_ds.filters.schedule import StrengthSchedule
from spectral_ds.filters.spectral_filter import GraphFilter, SpectralFilter, StackedFilter
from spectral_ds.filters.temporal import TemporalFilter
from spectral_ds.filters.transfer import BandTransfer, ExactTransfer, FixedTransfer, Transfer
from spectral_ds.filters.updates import Updates
from spectral_ds.filters.work import filter_work, penalty_work

__all__ = [
    "MAX_ORDER",
    "BandTransfer",
    "ChebyshevSeries",
    "ExactTransfer",
    "FixedTransfer",
    "GraphFilter",
    "GraphPenalty",
    "Heat",
    "Identity",
    "NormKeeper",
    "Penalty",
    "Polynomial",
    "Reference",
    "Regularizer",
    "Response",
    "SpectralFilter",
    "StackedFilter",
    "StrengthSchedule",
    "TemporalFilter",
    "Tikhonov",
    "ToleranceError",
    "Transfer",
    "Updates",
    "Window",
    "filter_work",
    "penalty_work",
    "whiten_gains",
    "wiener_gains",
]
