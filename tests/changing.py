"""Blocks by SGD with learning rate 1 whose trained parameters, or ranks, change.

In: a model, gradients, a section. Out: the oracle's step; steps of one process, and of a rank of
four that has its part of the inputs.
"""

import contextlib
import io

import numpy as np
import oracle
import torch
from torch.distributed.fsdp import fully_shard

import spectral_ds
from spectral_ds.attach.runner import Runner

SECTION = {
    "graph": {"edges": [{"family": "depth"}, {"family": "similarity", "neighbours": 3}]},
    "filter": {"response": "polynomial", "coefficients": [1.0, -0.4, 0.05], "strength": 0.8},
    "monitor": {"interval": 1},
    "operator": {"kernel": "torch_csr"},
}
REMEMBERING = {
    **SECTION,
    "filter": {**SECTION["filter"], "temporal": {"decay": 0.5, "amplify": 1.0}},
    "regularizer": {"strength": 0.1, "ridge": 1.0},
}
INPUTS = torch.randn(32, 6, generator=torch.Generator().manual_seed(2))


class Blocks(torch.nn.Module):
    """Layers of equal shapes, in whose depth path and similarity all rows take part."""

    def __init__(self, blocks=3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(blocks))

    def forward(self, inputs):
        for layer in self.layers:
            inputs = torch.tanh(layer(inputs))
        return inputs


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def as_arrays(model, names):
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters() if n in names}


def filtered(model, gradients, section=SECTION):
    """What the oracle makes of the gradients, on the graph of the present weights."""
    return filtered_on(as_arrays(model, gradients), gradients, section)


def step_of(model, optimizer):
    """What a step of learning rate 1 subtracts, by name."""
    before = as_arrays(model, dict(model.named_parameters()))
    optimizer.step()
    after = as_arrays(model, before)
    return {name: before[name] - after[name] for name in before}


def assert_is(step, wanted):
    assert wanted.keys() <= step.keys()
    largest = np.max([np.abs(value).max() for value in wanted.values()])
    assert np.isfinite(largest)
    for name, value in step.items():
        expected = wanted.get(name, np.zeros_like(value))
        np.testing.assert_allclose(value, expected, atol=1e-5 * largest, rtol=0, err_msg=name)


def frozen(model, *layers):
    for index in layers:
        model.layers[index].requires_grad_(False)
    return model


def filtered_on(weights, gradients, section=SECTION):
    """What the oracle makes of the gradients, on the graph of weights that there were before."""
    ordered = {name: gradients[name] for name in weights}
    adjacency = oracle.adjacency_of(weights, section["graph"]["edges"])
    response = oracle.response_of(section["filter"], oracle.bound_of(adjacency))
    return oracle.apply_function(oracle.laplacian_of(adjacency), response, ordered)


class Said(io.StringIO):
    """What a runner prints."""

    runner: Runner


@contextlib.contextmanager
def watching(section=SECTION):
    """What a runner prints, and itself."""
    said, runner = Said(), Runner(spectral_ds.load_config(section))
    said.runner = runner
    runner.watch()
    try:
        with contextlib.redirect_stderr(said):
            yield said
    finally:
        runner.stop()


def loss_of(model, inputs):
    return model(inputs).square().sum()


def whole(module):
    """All parameters, whole."""
    return {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone().numpy()
        for n, p in module.named_parameters()
    }


def mean_gradients(ranks, model):
    """Averaged over the inputs of some ranks, by name."""
    inputs = INPUTS.chunk(4)
    (sum(loss_of(model, inputs[rank]) for rank in ranks) / len(ranks)).backward()
    return {n: p.grad.numpy() for n, p in model.named_parameters()}


def train_step(model, module, optimizer, rank):
    """What a step subtracts from the whole parameters."""
    before = whole(module)
    optimizer.zero_grad()
    loss_of(model, INPUTS.chunk(4)[rank]).backward()
    optimizer.step()
    after = whole(module)
    return {name: before[name] - after[name] for name in before}


def shard(module, mesh, each_layer=True):
    for layer in module.layers if each_layer else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)
