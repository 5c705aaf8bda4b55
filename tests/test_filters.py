"""Responses, Chebyshev series and their error, against PyGSP and dense functions."""

import numpy as np
import pygsp
import pytest
import scipy.sparse
import torch

from spectral_ds.filters import (
    ChebyshevSeries,
    Heat,
    Identity,
    Polynomial,
    Tikhonov,
    Window,
)
from spectral_ds.filters.chebyshev import apply_series
from spectral_ds.filters.spectral_filter import SpectralFilter
from spectral_ds.graph import Depth, ParameterNodes, Similarity
from spectral_ds.laplacian import ParameterGraph
from spectral_ds.laplacian.workspace import Workspace
from spectral_ds.sharding import Communicator, Fragment, ShardLayout

CPU = torch.device("cpu")


def small_graph(normalized=True, kernel="torch_csr"):
    parameters = [ParameterNodes(f"l.{block}.w", (9, 5)) for block in range(3)]
    communicator = Communicator(None, CPU)
    layout = ShardLayout.gather([Fragment(p.name, 0, 45) for p in parameters], communicator)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(45, generator=generator) for _ in parameters]
    return ParameterGraph.build(
        parameters,
        [Similarity(4), Depth()],
        layout,
        weights,
        communicator,
        communicator,
        normalized=normalized,
        kernel=kernel,
        bucket_elements=10**6,
        seed=0,
        progress=lambda done: None,
    )


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
    series = ChebyshevSeries.fit(response, lambda_max, "auto", 1e-3)
    assert series.order == order
    assert series.error < 1e-10 * max(1, lambda_max**order)


@pytest.mark.parametrize("response", [Heat(1.0), Heat(7.0), Tikhonov(3.0)])
@pytest.mark.parametrize("lambda_max", [2.0, 17.3])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-6])
def test_auto_takes_the_least_order_within_tolerance(response, lambda_max, tolerance):
    series = ChebyshevSeries.fit(response, lambda_max, "auto", tolerance)
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
    with pytest.raises(ValueError, match=r"filter\.tolerance 0\.001 .* 512 .* filter\.tau"):
        ChebyshevSeries.fit(Heat(1e6), 2.0, "auto", 1e-3)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("tau", "order"), [(1.0, 30), (4.0, 40)])
def test_heat_equals_pygsp(normalized, tau, order):
    graph = small_graph(normalized)
    kind = "normalized" if normalized else "combinatorial"
    # W is read back from the combinatorial Laplacian of the same graph.
    combinatorial = small_graph(False).laplacian().toarray()
    adjacency = scipy.sparse.csr_matrix(np.diag(np.diag(combinatorial)) - combinatorial)
    reference = pygsp.graphs.Graph(adjacency, lap_type=kind)
    reference.compute_fourier_basis()
    heat = pygsp.filters.Filter(reference, lambda v: np.exp(-tau * v))
    signal = torch.randn(27, 5, generator=torch.Generator().manual_seed(2))
    expected = heat.filter(signal.double().numpy(), method="exact")
    series = ChebyshevSeries.fit(Heat(tau), graph.lambda_max, order, 1e-3)
    [operator] = graph.operators
    workspace = Workspace(graph.operators, CPU)
    scratch = workspace.of(operator)
    scratch.x.copy_(signal)
    apply_series(operator, series.coefficients, scratch)
    np.testing.assert_allclose(scratch.out.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("kernel", ["torch_csr", "torch_sparse"])
def test_leftovers_in_scratch_memory_do_not_reach_the_result(kernel):
    graph = small_graph(kernel=kernel)
    workspace = Workspace(graph.operators, CPU)
    series = ChebyshevSeries.fit(Heat(1.0), 2.0, "auto", 1e-3)
    spectral_filter = SpectralFilter(
        graph.operators, workspace, series, strength=0.5, warmup_steps=0, interval=1
    )
    results = []
    for leftover in (0.0, float("nan")):
        for buffer in workspace.of(graph.operators[0]):
            buffer.fill_(leftover)
        gradients = [torch.arange(45.0) + i for i in range(3)]
        spectral_filter.apply(gradients, 0)
        results.append(torch.cat(gradients))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert results[0].isfinite().all()


@pytest.mark.parametrize("kernel", ["torch_csr", "torch_sparse", "auto"])
def test_kernels_multiply_alike(kernel):
    operator = small_graph(normalized=False, kernel=kernel).operators[0]
    dense = small_graph(normalized=False).laplacian().toarray()
    lambda_max = small_graph(normalized=False).lambda_max
    scaled = 2 / lambda_max * dense - np.eye(27)
    x = torch.randn(27, 5)
    out = torch.randn(27, 5)
    for alpha, beta in ((1.0, 0.0), (2.0, -1.0)):
        expected = alpha * scaled @ x.double().numpy() + beta * out.double().numpy()
        operator.apply(x, out, alpha, beta)
        np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)


def test_strength_warms_up_and_interval_skips_steps():
    graph = small_graph()
    series = ChebyshevSeries.fit(Heat(1.0), 2.0, "auto", 1e-3)
    spectral_filter = SpectralFilter(
        graph.operators,
        Workspace(graph.operators, CPU),
        series,
        strength=0.8,
        warmup_steps=4,
        interval=2,
    )
    strengths = [spectral_filter.strength_at(step) for step in range(8)]
    np.testing.assert_allclose(strengths, [0.2, 0, 0.6, 0, 0.8, 0, 0.8, 0])
    assert [spectral_filter.hops_at(step) for step in (0, 1)] == [series.order, 0]
    gradients = [torch.ones(45) for _ in range(3)]
    spectral_filter.apply(gradients, 1)
    assert all((gradient == 1).all() for gradient in gradients)


def test_a_missing_torch_sparse_is_an_error_or_a_warning(monkeypatch, caplog):
    from spectral_ds.laplacian import KernelUnavailableError, kernels, require_kernel

    monkeypatch.setitem(__import__("sys").modules, "torch_sparse", None)
    kernels._torch_sparse.cache_clear()
    kernels._warn_once.cache_clear()
    try:
        with pytest.raises(KernelUnavailableError, match=r"operator\.kernel.*no-build-isolation"):
            require_kernel("torch_sparse")
        require_kernel("torch_csr")
        assert not caplog.records
        require_kernel("auto")
        require_kernel("auto")
        assert len(caplog.records) == 1
        assert "native CSR" in caplog.text
        assert small_graph(kernel="auto").operators[0].kernel.name == "torch_csr"
    finally:
        kernels._torch_sparse.cache_clear()
