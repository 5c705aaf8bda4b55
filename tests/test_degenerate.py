"""Graphs and numbers at the edge of what there is: none of them becomes another number or NaN."""

import numpy as np
import oracle
import pytest
import scipy.sparse
import torch
from activations import RATE, CalledByIds, operator_of, section_of
from any_model import SEEDS, models, quick
from hypothesis import given
from hypothesis import strategies as st
from plain_step import assert_close, one_step
from small_graphs import ALONE, transfer_on
from torch import nn

import spectral_ds
from spectral_ds.filters import GraphFilter, Heat, Tikhonov, Window
from spectral_ds.graph import Edges, ParameterNodes, Similarity
from spectral_ds.laplacian import ParameterGraph, Work, plan_operators
from spectral_ds.sharding import Fragment, ShardLayout

QUIET = {"monitor": {"enabled": False}}
FILTER = {"response": "tikhonov", "tau": 2.0, "strength": 1.0, "tolerance": 1e-7}
SIMILAR = [{"family": "similarity", "neighbours": 2}]


# Graphs


def rows_of(kind):
    """Weights of ten rows, some of which are no directions, or the same ones."""
    rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    if kind == "duplicates":
        rows[1:4], rows[5] = rows[0], -rows[0]
    elif kind == "constant":
        rows[:] = torch.arange(1, 11)[:, None]
    elif kind == "zeros":
        rows[::2] = 0
    elif kind == "one":
        rows[1:] = 0
    elif kind == "none":
        rows[:] = 0
    return rows


@pytest.mark.parametrize("laplacian", ["normalized", "combinatorial"])
@pytest.mark.parametrize("kind", ["duplicates", "constant", "zeros", "one", "none"])
def test_rows_without_a_direction_and_equal_rows_are_filtered_as_the_oracle_does(kind, laplacian):
    model = nn.Linear(4, 10)
    model.weight.data = rows_of(kind)
    graph = {"edges": SIMILAR, "laplacian": laplacian}
    before, gradients, moved, plugin = one_step(model, {"graph": graph, "filter": FILTER, **QUIET})
    names = [parameter.name for parameter in plugin.graph.parameters]
    adjacency = oracle.adjacency_of({name: before[name] for name in names}, SIMILAR)
    matrix = oracle.laplacian_of(adjacency, laplacian)
    signal = {name: gradients[name] for name in names}
    assert_close(moved, oracle.apply_function(matrix, oracle.response_of(FILTER), signal))


def star(leaves, pairs):
    """A hub with so many leaves, and so many pairs of nodes beside it; all edges twice."""
    first = 1 + leaves + 2 * np.arange(pairs)
    source = np.concatenate([np.zeros(leaves, np.int64), first])
    target = np.concatenate([np.arange(1, leaves + 1), first + 1])
    weight = np.ones(len(source))
    return Edges(
        np.concatenate([source, target]), np.concatenate([target, source]), np.tile(weight, 2)
    )


@pytest.fixture(scope="module")
def large():
    """A graph of a million nodes, all on this rank, and its edges."""
    leaves, pairs = 10_000, 495_000
    nodes = 1 + leaves + 2 * pairs
    parameters, edges = [ParameterNodes("w", (nodes, 1))], star(leaves, pairs)
    layout = ShardLayout.gather([Fragment("w", 0, nodes)], ALONE)
    graph = ParameterGraph.of_edges(
        parameters, (Similarity(1),), layout, edges, ALONE, normalized=True
    )
    assert (graph.num_nodes, graph.num_edges) == (nodes, leaves + pairs)
    return graph, layout, edges


@pytest.mark.parametrize("kernel", ["torch_csr", "torch_sparse", "embedding_bag"])
def test_a_million_nodes_of_one_edge_and_one_of_ten_thousand(large, kernel):
    if kernel == "torch_sparse":
        pytest.importorskip("torch_sparse")
    graph, layout, edges = large
    nodes = graph.num_nodes
    transfer = transfer_on(graph, Tikhonov(2.0), "best", 1e-6)
    plan = plan_operators(
        graph, layout, ALONE, ALONE, work=Work(hops=transfer.hops, transposes=2),
        exchange="best", kernel=kernel, bucket_elements=10**8,
    )  # fmt: skip
    x = torch.randn(nodes, generator=torch.Generator().manual_seed(0))
    found = x.clone()
    GraphFilter(plan.shipments, transfer).apply([found], 1.0)
    # (I + τL) y = x, in float64.
    adjacency = scipy.sparse.csr_matrix((edges.weight, (edges.source, edges.target)))
    scale = scipy.sparse.diags(1 / np.sqrt(np.asarray(adjacency.sum(1)).ravel()))
    matrix = 3 * scipy.sparse.identity(nodes) - 2 * scale @ adjacency @ scale
    assert np.abs(matrix @ found.double().numpy() - x.double().numpy()).max() < 1e-4


RESPONSES = [Heat(3.0), Tikhonov(20.0), Window(0.9)]


@quick
@given(models(), st.sampled_from(RESPONSES), SEEDS)
def test_no_signal_grows_beyond_the_largest_gain(model, response, seed):
    """λ_max bounds the spectrum from above, so that no series is evaluated outside of it."""
    bound = model.graph().lambda_max
    assert np.linalg.eigvalsh(model.dense_laplacian()).max() <= bound * (1 + 1e-12)
    generator = np.random.default_rng(seed)
    signal = {name: generator.standard_normal(x.shape) for name, x in model.weights.items()}
    largest = np.abs(response(np.linspace(0, bound, 501))).max()
    assert norm(model.filtered(signal, response)) <= (largest + 1e-5) * norm(signal)


def norm(signal):
    return np.sqrt(sum(np.square(each).sum() for each in signal.values()))


# Numbers


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-100, 1e-42, 0.0])
def test_a_gradient_of_any_size_is_filtered_alike(scale):
    """The last are the least numbers that float32 has, and none."""
    found = {}
    for factor in (1.0, scale):
        model = nn.Linear(4, 10)
        model.weight.data = rows_of("usual")
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        section = {"graph": {"edges": SIMILAR}, "filter": FILTER, **QUIET}
        plugin = spectral_ds.attach(model, optimizer, section)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * factor
        plugin.filter_gradients()
        found[factor] = model.weight.grad.double()
        plugin.detach()
    # Numbers below the least normal one have a step of 1.4e-45.
    assert torch.allclose(found[scale], found[1.0] * scale, rtol=1e-5, atol=1e-43)


# Co-activation


class Layer(nn.Module):
    """One layer, called with what enters it."""

    def __init__(self, inputs):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(inputs, 3, bias=False)

    def forward(self, x):
        return self.layer(x)


def given_inputs(x, **edge):
    """A plugin that keeps these inputs."""
    model = Layer(x.shape[1])
    section = section_of({"rank": 2, **edge, "keep": "given"})
    plugin = spectral_ds.attach(model, torch.optim.SGD(model.parameters(), lr=RATE), section)
    plugin.calibrate([x])
    return plugin


@pytest.mark.parametrize("inputs", [6, 60])
def test_inputs_that_are_always_the_same_make_a_graph_of_rank_one(inputs):
    direction = torch.randn(inputs, generator=torch.Generator().manual_seed(0))
    plugin = given_inputs(direction.expand(20, -1))
    expected = inputs * torch.outer(direction, direction) / direction.square().sum()
    found = plugin.graph.operator("layer.weight")
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4 * inputs)
    plugin.detach()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_vectors_that_are_not_finite_do_not_count(value):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    expected = operator_of(x[1:].double().numpy(), 2)
    x[0, 3] = value
    plugin = given_inputs(x)
    np.testing.assert_allclose(plugin.graph.operator("layer.weight"), expected, atol=1e-5)
    plugin.detach()


def test_a_model_whose_activations_are_not_finite_has_no_graph_and_is_told_so(caplog):
    model = CalledByIds()
    with torch.no_grad():
        model.llama.model.layers[0].input_layernorm.weight[0] = torch.inf
    plugin = spectral_ds.attach(
        model, torch.optim.SGD(model.parameters(), lr=RATE), section_of({"rank": 2})
    )
    assert "no finite activation has entered llama.model.layers.0." in caplog.text
    assert "co-activation of 0 parameters, 0 graphs" in caplog.text
    plugin.detach()
