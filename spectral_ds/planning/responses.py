"""How many products with L a response takes: the rules of `spectral_ds.stack.responses`."""

from dataclasses import dataclass, replace
from typing import cast

import torch

from spectral_ds.config import ADAPTIVE, FilterConfig, SpectralConfig, SpectralConfigError
from spectral_ds.filters import FixedTransfer, Polynomial, Response, ToleranceError
from spectral_ds.laplacian import ParameterGraph
from spectral_ds.spectrum import COEFFICIENTS_PER_BAND
from spectral_ds.stack.responses import smooth_response, step_gains


@dataclass(frozen=True)
class Spectrum:
    """What a transfer function wants to know of a graph."""

    lambda_max: float
    only_paths: bool


@dataclass(frozen=True)
class Hops:
    """Products with L of the filter, and of the regularizer (None without one)."""

    filter: int
    penalty: int | None
    is_identity: bool


def hops_of(config: SpectralConfig, spectrum: Spectrum) -> Hops:
    """The hops of a configuration on a graph.

    Raises:
        SpectralConfigError: no series is close enough to the response.
    """
    hops, is_identity = _filter(config.filter, spectrum)
    settings = config.regularizer
    if settings.strength == 0:
        return Hops(hops, None, is_identity)
    if settings.response == "laplacian":
        penalty = _series(Polynomial((0.0, 1.0)), "auto", 1e-3, spectrum).hops
    else:
        penalty, _ = _filter(replace(config.filter, response=settings.response), spectrum)
    return Hops(hops, penalty, is_identity)


def _filter(settings: FilterConfig, spectrum: Spectrum) -> tuple[int, bool]:
    if settings.response in ADAPTIVE:
        usual = COEFFICIENTS_PER_BAND * settings.bands - 1
        return (settings.order if isinstance(settings.order, int) else usual), False
    steps = step_gains(settings)
    if steps is not None:
        return steps[2], False
    try:
        transfer = _series(smooth_response(settings), settings.order, settings.tolerance, spectrum)
    except ToleranceError as error:
        raise SpectralConfigError(f"spectral_ds.{error}") from error
    return transfer.hops, transfer.is_identity


def _series(
    response: Response, order: int | str, tolerance: float, spectrum: Spectrum
) -> FixedTransfer:
    graph = cast(ParameterGraph, spectrum)  # of which it asks for no more
    return FixedTransfer(response, graph, order, tolerance, torch.device("cpu"))
