"""Choosing: from a configuration to the transfer functions of its filter and its regularizer.

In: settings, and what a transfer function wants to know of a graph: λ_max, and whether it consists
of depth paths only. Out: `Transfers`, and the work that they take at a step.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from spectral_ds.config import ADAPTIVE, FilterConfig, SpectralConfig, SpectralConfigError
from spectral_ds.filters import (
    MAX_ORDER,
    BandTransfer,
    ExactTransfer,
    FixedTransfer,
    Heat,
    Identity,
    Polynomial,
    Response,
    Tikhonov,
    ToleranceError,
    Transfer,
    Window,
    filter_work,
    penalty_work,
    whiten_gains,
    wiener_gains,
)
from spectral_ds.laplacian import Exchange, Work
from spectral_ds.spectrum import COEFFICIENTS_PER_BAND, GradientStatistics, equal_edges

# lowpass, highpass, bandpass: edges are smooth over about π/32 of the spectrum.
STEP_ORDER = 31
# r(λ) = λ
LAPLACIAN = Polynomial((0.0, 1.0))


class Transfers(NamedTuple):
    """The functions of L that act on one graph."""

    filter: Transfer  # h
    penalty: Transfer | None  # r; None without a regularizer


class Works(NamedTuple):
    """What each transfer function takes at a step where it acts."""

    filter: Work
    penalty: Work

    @property
    def total(self) -> Work:
        """The work of a step where both act."""
        return self.filter + self.penalty


def choose_transfers(
    config: SpectralConfig,
    lambda_max: float,
    only_paths: bool,
    device: torch.device,
    statistics: GradientStatistics | None = None,
    warn: Callable[[str], None] | None = None,
    is_exact: bool = False,
) -> Transfers:
    """The transfer functions of a configuration on one graph; no communication.

    Args:
        lambda_max: end of the graph's spectrum.
        only_paths: whether the graph consists of depth paths.
        device: of the coefficients.
        statistics: what adaptive responses follow; None: their gains are 1, as before the first
            sample.
        warn: told of a response of which no series is within the tolerance: MAX_ORDER is then used;
            None: that is an error.
        is_exact: whether eigenvectors are known, so that no series is needed.

    Raises:
        SpectralConfigError: no series is within the tolerance, and `warn` is None.
    """

    def fixed(response: Response, order: int | str, tolerance: float) -> Transfer:
        if is_exact:
            return ExactTransfer(response, lambda_max, device)
        return FixedTransfer(response, lambda_max, only_paths, order, tolerance, device)

    def chosen(settings: FilterConfig) -> Transfer:
        if settings.response in ADAPTIVE:
            return _adaptive(settings, statistics, device)
        steps = step_gains(settings)
        if steps is not None:
            return _by_bands(*steps, device)
        response = smooth_response(settings)
        try:
            return fixed(response, settings.order, settings.tolerance)
        except ToleranceError as error:
            if warn is None:
                raise SpectralConfigError(f"spectral_ds.{error}") from error
            warn(f"{error}; order {MAX_ORDER} is used")
            return fixed(response, MAX_ORDER, settings.tolerance)

    of_filter, name = chosen(config.filter), config.regularizer.response
    if config.regularizer.strength == 0:
        return Transfers(of_filter, None)
    if name == "laplacian":  # a polynomial: its series is exact whatever the tolerance
        return Transfers(of_filter, fixed(LAPLACIAN, "best", 1e-3))
    return Transfers(of_filter, chosen(replace(config.filter, response=name)))


def _by_bands(
    edges: Sequence[float], gains: Sequence[float], order: int, device: torch.device
) -> Transfer:
    """A response by fixed gains of bands."""
    constant = torch.tensor(gains, dtype=torch.float64, device=device)
    return BandTransfer(edges, lambda: constant, lambda: 0, order, device)


def works_of(transfers: Transfers, config: SpectralConfig) -> Works:
    """The work of a configuration's filter and of its regularizer on one graph."""
    of_filter, of_penalty = filter_work(transfers.filter, config.filter.strength > 0), Work()
    if transfers.penalty is not None:
        of_penalty = penalty_work(transfers.penalty)
    return Works(of_filter, of_penalty)


def check_exchanges(works: Works, exchanges: Collection[Exchange], config: SpectralConfig) -> None:
    """Check that what is exchanged by boundary rows has a series of products.

    Args:
        exchanges: those that some group of joined parameters uses.

    Raises:
        SpectralConfigError: a function has no series, and rows exchange their boundary, as only
            `operator.exchange: boundary` makes them.
    """
    responses = {
        "filter": (works.filter, config.filter.response),
        "regularizer": (works.penalty, config.regularizer.response),
    }
    for key, (work, response) in responses.items():
        if work.hops is None and "boundary" in exchanges:
            raise SpectralConfigError(
                "spectral_ds.operator.exchange = boundary: no Chebyshev series of "
                f"spectral_ds.{key}.response = {response} is close enough to its exact values on "
                "depth paths; use best or transpose"
            )


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


def _adaptive(
    settings: FilterConfig, statistics: GradientStatistics | None, device: torch.device
) -> Transfer:
    """A response whose gains follow the statistics; without them, gains of 1."""

    def gains() -> torch.Tensor:
        if statistics is None:
            return torch.ones(settings.bands, dtype=torch.float64, device=device)
        if settings.response == "wiener":
            return wiener_gains(statistics.estimate)
        return whiten_gains(statistics.power, settings.power)

    usual = COEFFICIENTS_PER_BAND * settings.bands - 1
    return BandTransfer(
        equal_edges(settings.bands),
        gains,
        lambda: 0 if statistics is None else statistics.samples,
        settings.order if isinstance(settings.order, int) else usual,
        device,
    )
