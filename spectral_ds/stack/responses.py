"""Choosing: from the configuration of a filter to its response and its transfer function."""

from collections.abc import Sequence

import torch

from spectral_ds.config import FilterConfig
from spectral_ds.filters import (
    BandTransfer,
    Heat,
    Identity,
    Polynomial,
    Response,
    Tikhonov,
    Transfer,
    Window,
    whiten_gains,
    wiener_gains,
)
from spectral_ds.spectrum import COEFFICIENTS_PER_BAND, GradientStatistics, equal_edges

# lowpass, highpass, bandpass: edges are smooth over about π/32 of the spectrum.
STEP_ORDER = 31


def smooth_response(settings: FilterConfig) -> Response:
    """The response of a formula in λ."""
    responses: dict[str, Response] = {
        "identity": Identity(),
        "heat": Heat(settings.tau),
        "tikhonov": Tikhonov(settings.tau),
        "window": Window(settings.alpha),
        "polynomial": Polynomial(settings.coefficients),
    }
    return responses[settings.response]


def step_gains(
    settings: FilterConfig,
) -> tuple[Sequence[float], Sequence[float], int] | None:
    """(edges, gains, order) of a response by fixed gains of bands; None for any other."""
    steps: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        "lowpass": ((0, settings.cutoff, 1), (1, 0)),
        "highpass": ((0, settings.cutoff, 1), (0, 1)),
        "bandpass": ((0, settings.low, settings.high, 1), (0, 1, 0)),
        "bands": (list(equal_edges(len(settings.gains))), settings.gains),
    }
    if settings.response not in steps:
        return None
    edges, gains = steps[settings.response]
    usual = STEP_ORDER
    if settings.response == "bands":
        usual = max(STEP_ORDER, COEFFICIENTS_PER_BAND * len(gains) - 1)
    return edges, gains, settings.order if isinstance(settings.order, int) else usual


def adaptive_transfer(
    settings: FilterConfig, statistics: GradientStatistics, device: torch.device
) -> Transfer:
    """A response whose gains follow the statistics."""

    def gains() -> torch.Tensor:
        if settings.response == "wiener":
            return wiener_gains(statistics.estimate)
        return whiten_gains(statistics.power, settings.power)

    usual = COEFFICIENTS_PER_BAND * settings.bands - 1
    return BandTransfer(
        equal_edges(settings.bands),
        gains,
        lambda: statistics.samples,
        settings.order if isinstance(settings.order, int) else usual,
        device,
    )
