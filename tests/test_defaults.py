"""What torch takes where nobody names a dtype or device is the user's to set, as is autocast: all
is computed as without."""

import contextlib
import functools

import numpy as np
import pytest
import torch
from activations import CalledByIds, random_ids, section_of
from small_graphs import ALONE, CPU, small_graph

import spectral_ds
from spectral_ds.laplacian import kernels
from spectral_ds.spectrum import density_of_states, lowest_eigenpairs

LOUD = {"monitor": {"interval": 1}, "statistics": {"interval": 1}}
SECTIONS = {
    "similarity": {
        "graph": {
            "edges": [{"family": "similarity", "features": "gradient", "sketch_width": 4}],
            "refresh_interval": 1,
        },
        "filter": {"temporal": {"decay": 0.9, "amplify": 1.0}, "rescale": "norm"},
        "regularizer": {"strength": 0.1, "ridge": 1.0},
        "operator": {"kernel": "torch_csr"},
        **LOUD,
    },
    "co-activation": section_of(
        {"rank": 8, "learn": "training", "samples": 4},
        regularizer={"strength": 0.1, "coupling": "decoupled"},
        **LOUD,
    ),
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND = {
    "bf16": lambda: default_dtype(torch.bfloat16),
    "fp64": lambda: default_dtype(torch.float64),
    "device": lambda: torch.device("meta"),  # what is on it by mistake cannot be used
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@functools.cache
def steps(label, around=None):
    """Weights and figures after some steps of a model that is float32 on the CPU."""
    model, ids = CalledByIds().train(), random_ids(18).chunk(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with AROUND[around]() if around else contextlib.nullcontext():
        plugin = spectral_ds.attach(model, optimizer, SECTIONS[label])
        for batch in ids:
            model(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        plugin.load_state_dict(plugin.state_dict())
    plugin.detach()
    figures = {key: each for key, each in plugin.metrics().items() if "seconds" not in key}
    return [parameter.detach() for parameter in model.parameters()], figures


@pytest.mark.parametrize("around", ["bf16", "fp64", "device"])
@pytest.mark.parametrize("label", SECTIONS)
def test_training_is_the_same(label, around):
    wanted, wanted_figures = steps(label)
    found, figures = steps(label, around)
    for mine, other in zip(found, wanted, strict=True):
        assert torch.equal(mine, other)
    assert figures == wanted_figures


@pytest.mark.parametrize("around", ["bf16", "fp64", "device"])
def test_estimated_spectra_are_the_same(around):
    graph, _ = small_graph()
    found = []
    for context in (contextlib.nullcontext(), AROUND[around]()):
        with context:
            [pairs] = lowest_eigenpairs(graph, 2, ALONE, seed=0, dense_nodes=0)
            density = density_of_states(graph, 4, ALONE, seed=0, dense_nodes=0)
        found.append((pairs.values, density.share))
    np.testing.assert_equal(found[1], found[0])


@pytest.mark.parametrize("name", kernels.KERNELS)
@pytest.mark.parametrize("around", AROUND)
def test_a_kernel_is_tried_as_it_is_used(name, around):
    with AROUND[around]():
        kernels.multiply_tiny(name, CPU)


@pytest.mark.parametrize("around", ["bf16", "fp64", "autocast"])
def test_the_fastest_kernel_is_looked_for(around, monkeypatch):
    timed, usual = [], kernels._seconds
    monkeypatch.setattr(
        kernels, "_seconds", lambda kernel, *a: timed.append(kernel.name) or usual(kernel, *a)
    )
    with AROUND[around]():
        small_graph(kernel="best")
    assert {"torch_csr", "embedding_bag"} <= set(timed)
