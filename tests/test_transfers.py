"""Responses, their Chebyshev series, gains by band: what a filter multiplies frequencies by."""

import itertools

import numpy as np
import pytest
import torch
from small_graphs import CPU, PATHS, SPARSE, filter_of, small_graph, transfer_on

from spectral_ds.filters import (
    BandTransfer,
    ChebyshevSeries,
    Heat,
    Identity,
    Polynomial,
    Tikhonov,
    ToleranceError,
    Window,
    chebyshev,
    whiten_gains,
    wiener_gains,
)
from spectral_ds.spectrum import SignalAndNoise


@pytest.mark.parametrize(
    ("response", "order"),
    [
        (Identity(), 0),
        (Window(0.4), 1),
        (Polynomial((1.0, -0.3, 0.05, 0.01)), 3),
        (Polynomial((0.5,)), 0),
    ],
)
@pytest.mark.parametrize("lambda_max", [2.0, 17.3])
def test_polynomials_are_exact_at_their_degree(response, order, lambda_max):
    series = ChebyshevSeries.fit(response, lambda_max, "best", 1e-3)
    assert series.order == order
    assert series.error < 1e-10 * max(1, lambda_max**order)


@pytest.mark.parametrize("response", [Heat(1.0), Heat(7.0), Tikhonov(3.0)])
@pytest.mark.parametrize("lambda_max", [2.0, 17.3])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-6])
def test_auto_takes_the_least_order_within_tolerance(response, lambda_max, tolerance):
    series = ChebyshevSeries.fit(response, lambda_max, "best", tolerance)
    grid = np.linspace(0, lambda_max, 4001)
    x = 2 * grid / lambda_max - 1
    error = np.abs(np.polynomial.chebyshev.chebval(x, series.coefficients) - response(grid)).max()
    assert error <= series.error * (1 + 1e-6) <= tolerance * (1 + 1e-6)
    lower = ChebyshevSeries.fit(response, lambda_max, series.order - 1, tolerance)
    assert lower.error > tolerance


def test_an_order_below_the_degree_reports_its_error():
    series = ChebyshevSeries.fit(Polynomial((0.0, 0.0, 1.0)), 2.0, 1, 1e-3)
    assert series.order == 1
    assert series.error > 0.1


def test_a_tolerance_out_of_reach_names_the_keys():
    with pytest.raises(ToleranceError, match=r"filter\.tolerance 0\.001 .* 512 .* filter\.tau"):
        ChebyshevSeries.fit(Heat(1e6), 2.0, "best", 1e-3)


# Transfer functions


def test_identity_is_known_as_such_and_costs_no_hop():
    graph, plan = small_graph()
    transfer = transfer_on(graph, Identity(), "best", 1e-3)
    assert (transfer.hops, transfer.is_identity) == (0, True)
    assert filter_of(graph, plan, transfer, strength=1.0).is_idle(0)
    assert not transfer_on(graph, Polynomial((0.5,)), "best", 1e-3).is_identity


def test_an_order_that_the_user_wrote_is_kept_on_paths_too():
    """The exact eigenbasis then takes the series, not the response."""
    graph, _ = small_graph(families=PATHS)
    x = np.linspace(-1, 1, 9)
    exact = transfer_on(graph, Heat(3.0), "best", 1e-3)
    coarse = transfer_on(graph, Heat(3.0), 2, 1e-3)
    np.testing.assert_allclose(exact.at(x)(), np.exp(-3 * (x + 1)), atol=1e-12)
    assert exact.error <= 1e-7  # where rows are exchanged, the series takes the same values
    assert coarse.hops == 2
    series = np.polynomial.chebyshev.chebval(x, coarse.coefficients().numpy())
    np.testing.assert_allclose(coarse.at(x)(), series, atol=1e-12)
    assert np.abs(series - np.exp(-3 * (x + 1))).max() > 0.05


def test_only_paths_take_responses_that_have_no_series(monkeypatch):
    monkeypatch.setattr(chebyshev, "MAX_ORDER", 20)
    paths, _ = small_graph(families=PATHS)
    transfer = transfer_on(paths, Heat(1e3), "best", 1e-3)
    assert transfer.hops is None
    np.testing.assert_allclose(transfer.at(np.array([-1.0, 1.0]))(), [1, 0], atol=1e-12)
    with pytest.raises(ToleranceError):
        transfer_on(small_graph()[0], Heat(1e3), "best", 1e-3)


@pytest.mark.parametrize("edges", [(0, 0.25, 1), (0, 0.2, 0.5, 1), tuple(np.linspace(0, 1, 9))])
def test_band_transfer_has_each_gain_within_its_band(edges):
    gains = torch.tensor([(-1.0) ** b * (b + 1) for b in range(len(edges) - 1)]).double()
    transfer = BandTransfer(edges, lambda: gains, lambda: 0, 255, CPU)
    assert transfer.hops == 255
    for gain, (low, high) in zip(gains, itertools.pairwise(edges), strict=True):
        middle = np.array([low + high - 1])  # as x in [-1, 1]
        assert transfer.at(middle)().item() == pytest.approx(gain.item(), abs=0.05)


def test_band_transfer_stays_between_its_gains_and_is_what_its_series_is():
    gains = torch.tensor([0.0, 1.0, 0.0]).double()
    transfer = BandTransfer((0, 0.3, 0.4, 1), lambda: gains, lambda: 0, 31, CPU)
    x = np.linspace(-1, 1, 1001)
    values = transfer.at(x)().numpy()
    assert values.min() > -1e-12
    assert values.max() < 1 + 1e-12
    coefficients = transfer.coefficients().numpy()
    assert len(coefficients) == 32
    np.testing.assert_allclose(np.polynomial.chebyshev.chebval(x, coefficients), values, atol=1e-12)


def test_equal_gains_are_a_factor():
    gains = torch.full((4,), 0.7).double()
    transfer = BandTransfer((0, 0.25, 0.5, 0.75, 1), lambda: gains, lambda: 0, 15, CPU)
    np.testing.assert_allclose(transfer.at(np.linspace(-1, 1, 33))(), 0.7, atol=1e-12)


@pytest.mark.parametrize("families", [SPARSE, PATHS])
def test_the_filter_follows_gains_when_their_version_changes(families):
    graph, plan = small_graph(families=families)
    state = {"gain": 0.5, "version": 0}
    transfer = BandTransfer(
        (0, 0.5, 1),
        lambda: torch.full((2,), state["gain"]).double(),
        lambda: state["version"],
        7,
        CPU,
    )
    whole = filter_of(graph, plan, transfer, strength=1.0)
    for gain, version, factor in ((0.5, 0, 0.5), (3.0, 0, 0.5), (3.0, 1, 3.0)):
        state |= {"gain": gain, "version": version}
        gradients = [torch.ones(45) for _ in range(3)]
        whole.apply(gradients, 0)
        np.testing.assert_allclose(torch.cat(gradients), factor, atol=1e-5)


# Adaptive gains


def test_wiener_gains_keep_the_share_of_signal():
    signal = torch.tensor([3.0, 1.0, -0.5, 2.0, 0.0]).double()
    noise = torch.tensor([1.0, 3.0, 1.0, -0.1, 0.0]).double()
    gains = wiener_gains(SignalAndNoise(signal, noise))
    assert gains.tolist() == [0.75, 0.25, 0, 1, 1]


@pytest.mark.parametrize("exponent", [0.0, 0.25, 0.5, 1.0])
def test_whiten_gains_are_a_power_of_the_power_and_keep_the_total(exponent):
    power = torch.tensor([16.0, 4.0, 1.0]).double()
    gains = whiten_gains(power, exponent)
    np.testing.assert_allclose(gains / gains[0], [1, 4**exponent, 16**exponent])
    assert (gains.square() * power).sum().item() == pytest.approx(21)
    if exponent == 0.5:
        np.testing.assert_allclose(gains.square() * power, 7)


def test_whiten_gains_are_finite_without_power():
    assert whiten_gains(torch.zeros(3).double(), 0.5).tolist() == [1, 1, 1]
    gains = whiten_gains(torch.tensor([1.0, 0.0]).double(), 0.5)
    assert gains.isfinite().all()
    assert gains[0].item() == pytest.approx(np.sqrt((1 + 1e-12) / 2))
