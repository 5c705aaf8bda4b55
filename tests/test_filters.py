"""The filter of a step: kernels, strength, graphs one after another, norm, time and updates."""

import numpy as np
import pytest
import torch
from small_graphs import ALONE, PATHS, SPARSE, filter_of, small_graph, transfer_on

from spectral_ds.filters import (
    GraphFilter,
    Heat,
    NormKeeper,
    SpectralFilter,
    StrengthSchedule,
    TemporalFilter,
    Updates,
)
from spectral_ds.laplacian import KernelUnavailableError, kernels, require_kernel
from spectral_ds.sharding import Fragment


@pytest.mark.parametrize("families", [SPARSE, PATHS])
@pytest.mark.parametrize("kernel", ["torch_csr", "torch_sparse", "embedding_bag"])
def test_leftovers_in_scratch_memory_do_not_reach_the_result(kernel, families):
    graph, plan = small_graph(kernel=kernel, families=families)
    transfer = transfer_on(graph, Heat(1.0), "best", 1e-3)
    graph_filter = GraphFilter(plan.shipments, transfer)
    results = []
    for leftover in (0.0, float("nan")):
        for matrix in plan.operators[0].scratch:
            matrix.values.fill_(leftover)
        gradients = [torch.arange(45.0) + i for i in range(3)]
        graph_filter.apply(gradients, 0.5)
        results.append(torch.cat(gradients))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert results[0].isfinite().all()


@pytest.mark.parametrize("kernel", ["torch_csr", "torch_sparse", "embedding_bag", "best"])
def test_kernels_multiply_alike(kernel):
    graph, plan = small_graph(normalized=False, kernel=kernel)
    [operator] = plan.operators
    scaled = 2 / graph.lambda_max * graph.laplacian().toarray() - np.eye(27)
    x = torch.randn(27, 5)
    out = torch.randn(27, 5)
    for alpha, beta in ((1.0, 0.0), (2.0, -1.0)):
        expected = alpha * scaled @ x.double().numpy() + beta * out.double().numpy()
        operator.apply(operator.matrix(x), operator.matrix(out), alpha, beta)
        np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)


class BuiltWithoutCUDA(kernels.TorchSparseKernel):
    """As torch-sparse is where CUDA's compiler was not at hand: it multiplies on the host alone."""

    def multiply(self, x, out, alpha, beta):
        raise RuntimeError("Not compiled with CUDA support\nException raised from spmm")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_torch_sparse_that_does_not_work_here_is_an_error_or_a_warning(
    monkeypatch, caplog, is_there
):
    if is_there:
        monkeypatch.setitem(kernels.KERNELS, "torch_sparse", BuiltWithoutCUDA)
    else:
        monkeypatch.setitem(__import__("sys").modules, "torch_sparse", None)
    kernels._torch_sparse.cache_clear()
    kernels._warn_once.cache_clear()
    cpu = torch.device("cpu")
    words = r"operator\.kernel.*on cpu \(.*\); .*no-build-isolation"
    try:
        with pytest.raises(KernelUnavailableError, match=words) as refused:
            require_kernel("torch_sparse", cpu)
        assert ("CUDA support)" in str(refused.value)) == is_there
        require_kernel("torch_csr", cpu)
        assert not caplog.records
        require_kernel("best", cpu)
        require_kernel("best", cpu)
        assert len(caplog.records) == 1
        assert "torch's own" in caplog.text
        chosen = small_graph(kernel="best")[1].operators[0].kernel.name
        assert chosen in ("torch_csr", "embedding_bag")
    finally:
        kernels._torch_sparse.cache_clear()


# Strength


@pytest.mark.parametrize(
    ("schedule", "strengths"),
    [
        ({"warmup_steps": 4, "interval": 2}, [0.2, 0, 0.6, 0, 0.8, 0, 0.8, 0]),
        ({"warmup_steps": 2, "decay_steps": 4}, [0.4, 0.8, 0.8, 0.6, 0.4, 0.2, 0, 0]),
        ({"decay_steps": 2, "interval": 3}, [0.8, 0, 0, 0, 0, 0, 0, 0]),
        ({"decay_steps": 4}, [0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0]),
        ({"interval": 3}, [0.8, 0, 0, 0.8, 0, 0, 0.8, 0]),
        ({}, [0.8] * 8),
    ],
)
def test_strength_warms_up_falls_and_skips_steps(schedule, strengths):
    found = [StrengthSchedule(0.8, **schedule).at(step) for step in range(8)]
    np.testing.assert_allclose(found, strengths, atol=1e-15)


def test_a_step_of_strength_zero_leaves_gradients_alone():
    graph, plan = small_graph()
    transfer = transfer_on(graph, Heat(1.0), "best", 1e-3)
    whole = filter_of(graph, plan, transfer, strength=0.8, warmup_steps=4, interval=2)
    gradients = [torch.randn(45) for _ in range(3)]
    before = torch.cat(gradients)
    assert [whole.is_idle(step) for step in range(4)] == [False, True, False, True]
    whole.apply(gradients, 1)
    assert torch.equal(torch.cat(gradients), before)
    whole.apply(gradients, 2)
    assert not torch.equal(torch.cat(gradients), before)


@pytest.mark.parametrize("families", [SPARSE, PATHS])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_strength_mixes_the_filtered_signal_with_the_signal(families, strength):
    graph, plan = small_graph(families=families)
    transfer = transfer_on(graph, Heat(1.0), "best", 1e-6)
    gradients = [torch.randn(45) for _ in range(3)]
    x = torch.cat(gradients).view(27, 5).double().numpy()
    values, vectors = np.linalg.eigh(graph.laplacian().toarray())
    filtered = (vectors * np.exp(-values)) @ vectors.T @ x
    filter_of(graph, plan, transfer, strength=strength).apply(gradients, 0)
    expected = (1 - strength) * x + strength * filtered
    np.testing.assert_allclose(torch.cat(gradients).view(27, 5), expected, atol=1e-5)


def test_graphs_filter_one_after_another_then_comes_the_norm_then_time():
    order = []

    class Part:
        def __init__(self, name):
            self.name = name

        def is_identity(self, strength):
            return strength == 0

        def apply(self, signal, strength):
            order.append((self.name, strength))

        def norms(self, signal):
            order.append("norms")
            return 1.0

        def restore(self, signal, norms):
            order.append("restored")

    class Time:
        def apply(self, signal, scale, is_finite):
            order.append(("time", scale, is_finite))

    whole = SpectralFilter(
        lambda: [Part("rows"), Part("columns")], StrengthSchedule(0.5, interval=2), Part(""), Time()
    )
    whole.apply([], 0, scale=4.0)
    assert order == ["norms", ("rows", 0.5), ("columns", 0.5), "restored", ("time", 4.0, None)]
    assert not whole.is_idle(1)  # the running mean goes on


def test_a_graph_that_is_not_ready_leaves_signals_alone():
    graph, plan = small_graph()
    transfer = transfer_on(graph, Heat(1.0), "best", 1e-3)
    waiting = GraphFilter(plan.shipments, transfer, is_ready=False)
    gradients = [torch.randn(45) for _ in range(3)]
    before = torch.cat(gradients)
    waiting.apply(gradients, 1.0)
    assert torch.equal(torch.cat(gradients), before)


# Norm, time, updates


def test_rescaling_restores_the_norm_of_each_parameter():
    """Fragments 0 and 2 are of one parameter, 3 has no gradient, 4 is filtered to zero, 5 is it."""
    keeper = NormKeeper([0, 1, 0, 1, 2, 3], 4, ALONE)
    signal = [torch.randn(5), torch.randn(4).half(), torch.randn(3), None, torch.ones(2)]
    signal.append(torch.zeros(2))
    norms = keeper.norms(signal)
    expected = [torch.cat([signal[0], signal[2]]).norm(), signal[1].float().norm(), 2**0.5, 0]
    np.testing.assert_allclose(norms, expected, rtol=1e-6)
    for fragment, factor in ((0, 3.0), (1, 0.5), (2, 3.0), (4, 0.0)):
        signal[fragment] *= factor
    directions = [signal[i].clone() for i in (0, 1, 2)]
    keeper.restore(signal, norms)
    np.testing.assert_allclose(keeper.norms(signal)[:2], expected[:2], rtol=1e-3)
    np.testing.assert_allclose(signal[0], directions[0] / 3, rtol=1e-6)
    np.testing.assert_allclose(signal[2], directions[2] / 3, rtol=1e-6)
    np.testing.assert_allclose(signal[1].float(), 2 * directions[1].float(), rtol=2e-3)
    assert signal[4].tolist() == signal[5].tolist() == [0, 0]


def temporal_filter(*lengths, decay, amplify):
    names = [str(index) for index in range(len(lengths))]
    fragments = [Fragment(n, 0, length) for n, length in zip(names, lengths, strict=True)]
    return TemporalFilter(fragments, names, ALONE, decay=decay, amplify=amplify)


@pytest.mark.parametrize("scales", [[1.0] * 5, [4.0, 4096.0, 0.5, 1.0, 64.0]])
def test_temporal_filter_is_grokfast(scales):
    """Against algorithm 2 of arXiv 2405.20233, written as a loop; its mean is in true units."""
    temporal = temporal_filter(4, 2, decay=0.9, amplify=2.0)
    mean = None
    for scale in scales:
        gradient = torch.randn(4)
        mean = gradient if mean is None else 0.9 * mean + 0.1 * gradient
        fragments = [gradient * scale, None]
        temporal.apply(fragments, scale)
        np.testing.assert_allclose(fragments[0] / scale, gradient + 2 * mean, atol=1e-5)
    np.testing.assert_allclose(temporal.means[0], mean, atol=1e-5)
    assert temporal.means[1].tolist() == [0, 0]


def test_temporal_filter_forgets_a_step_that_is_not_finite():
    temporal = temporal_filter(2, 2, decay=0.9, amplify=2.0)
    temporal.apply([torch.ones(2), torch.ones(2)], 1.0)
    temporal.apply([torch.tensor([float("inf"), 1]), 9 * torch.ones(2)], 1.0)
    assert [mean.tolist() for mean in temporal.means] == [[1, 1], [1, 1]]
    fresh = temporal_filter(2, decay=0.9, amplify=2.0)
    fresh.apply([torch.full((2,), float("nan"))], 1.0)
    assert fresh.means[0].tolist() == [0, 0]
    assert not fresh.has_mean.any()


def test_weights_follow_what_is_done_to_their_update():
    weights = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    updates = Updates(weights)
    updates.remember(weights)
    for weight in weights:
        weight += 1.0
    with updates.of(weights) as moved:
        assert [update.tolist() for update in moved] == [[1, 1], [1]]
        moved[0] *= 0.5
        moved[1].zero_()
    assert [weight.tolist() for weight in weights] == [[1.5, 2.5], [3.0]]
