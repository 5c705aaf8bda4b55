"""Short runs of the tiny model end alike, sharded or not, whatever acts on their steps."""

import functools

import numpy as np
import pytest
import torch
from cells import Training

MLP = ["*.mlp.*", "*.o_proj.*"]


RATES = (0.5, 0.25)


STEPS_RUN = 4


METHODS = {
    "wiener": {
        "preset": "denoise",
        "graph": {"include": MLP, "refresh_interval": 2},
        "filter": {"rescale": "norm"},
    },
    "whiten": {
        "preset": "whiten",
        "graph": {
            "include": MLP,
            "edges": [{"family": "similarity", "features": "gradient", "scope": "role"}],
            "refresh_interval": 2,
        },
        "filter": {"temporal": {"decay": 0.7, "amplify": 1.5}, "interval": 3},
        "operator": {"exchange": "transpose"},
    },
    "stack": {
        "graphs": [
            {"include": MLP, "edges": [{"family": "similarity"}, {"family": "ring"}]},
            {"node": "column", "edges": [{"family": "similarity"}, {"family": "pair"}]},
        ],
        "filter": {"strength": 0.9, "warmup_steps": 2},
        "monitor": {"enabled": False},
        "operator": {"exchange": "boundary"},
    },
    "update": {
        "preset": "gradient_smoothing",
        "filter": {"rescale": "norm", "temporal": {"decay": 0.5, "amplify": 0.3}},
    },
    "laplacian_smoothing": {"preset": "laplacian_smoothing", "monitor": {"enabled": False}},
    "grokfast": {"preset": "grokfast", "monitor": {"enabled": False}},
}


def trained(name, method, optimizer=torch.optim.SGD):
    """Weights after a few steps; after each: edges and dense Laplacian, signal and noise."""
    section = METHODS[method] if method else None
    training = Training(name, section, optimizer, RATES)
    graphs, powers = [], []
    for index in range(STEPS_RUN):
        training.step(index)
        if method in ("wiener", "whiten"):
            graph = training.plugin.graph
            graphs.append((graph.num_edges, graph.laplacian().toarray()))
            found = training.plugin.snr()
            powers.append((found.signal, found.noise))
    weights = training.snapshot()
    training.close()
    return weights, graphs, np.array(powers)


@pytest.fixture(scope="module")
def on_one_process(ranks):
    return functools.cache(lambda method: ranks(1).run(trained, "plain", method)[0])


@pytest.mark.parametrize(("name", "world_size"), [("zero2", 3), ("zero3", 3), ("fsdp2", 2)])
@pytest.mark.parametrize("method", METHODS)
def test_sharded_training_equals_that_on_one_process(
    ranks, on_one_process, method, name, world_size
):
    weights, graphs, powers = on_one_process(method)
    unfiltered, *_ = on_one_process(None)
    moved = np.max([np.abs(weights[n] - unfiltered[n]).max() for n in weights])
    assert moved > 5e-3
    for each in (*weights.values(), powers, *(laplacian for _, laplacian in graphs)):
        assert np.isfinite(each).all()
    # The second sample on a graph tells signal from noise.
    assert not graphs or powers[-1].all()
    for other_weights, other_graphs, other_powers in ranks(world_size).run(trained, name, method):
        largest = np.abs(powers).max(initial=0)
        np.testing.assert_allclose(other_powers, powers, rtol=0, atol=1e-4 * largest)
        for parameter, value in weights.items():
            np.testing.assert_allclose(other_weights[parameter], value, atol=1e-6)
        for (edges, laplacian), (other_edges, other) in zip(graphs, other_graphs, strict=True):
            assert edges == other_edges
            np.testing.assert_allclose(other, laplacian, atol=1e-6)


@pytest.mark.parametrize("method", ["wiener", "whiten"])
def test_graphs_of_gradients_are_rebuilt_at_each_refresh_and_only_then(on_one_process, method):
    edges, laplacians = zip(*on_one_process(method)[1], strict=True)
    assert edges[0] == edges[1] == 0
    assert min(edges[2:]) > 0
    np.testing.assert_array_equal(laplacians[2], laplacians[3])
