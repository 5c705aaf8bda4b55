"""What is trained changes after the plugin was attached, or is not what was looked at: it is
filtered by the right graph from the next step on, or named once. In one process."""

import logging

import numpy as np
import oracle
import pytest
import torch

import spectral_ds

SECTION = {
    "graph": {"edges": [{"family": "depth"}, {"family": "similarity", "neighbours": 3}]},
    "filter": {"response": "polynomial", "coefficients": [1.0, -0.4, 0.05], "strength": 0.8},
    "monitor": {"enabled": False},
}
INPUTS = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))


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


def gradients_of(model):
    """Of what is trained, by name."""
    model.zero_grad()
    model(INPUTS).square().sum().backward()
    return {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}


def as_arrays(model, names):
    return {n: p.detach().numpy().copy() for n, p in model.named_parameters() if n in names}


def filtered(model, gradients, section=SECTION):
    """What the oracle makes of the gradients, on the graph of the present weights."""
    weights = as_arrays(model, gradients)
    ordered = {name: gradients[name] for name in weights}
    adjacency = oracle.adjacency_of(weights, section["graph"]["edges"])
    response = oracle.response_of(section["filter"], oracle.bound_of(adjacency))
    return oracle.apply_function(oracle.laplacian_of(adjacency), response, ordered)


def step_of(model, optimizer):
    """What a step of learning rate 1 subtracts, by name."""
    before = as_arrays(model, dict(model.named_parameters()))
    optimizer.step()
    after = as_arrays(model, before)
    return {name: before[name] - after[name] for name in before}


def assert_is(step, wanted):
    largest = max(np.abs(value).max() for value in wanted.values())
    for name, value in step.items():
        expected = wanted.get(name, np.zeros_like(value))
        np.testing.assert_allclose(value, expected, atol=1e-5 * largest, rtol=0, err_msg=name)


@pytest.fixture
def said(caplog):
    """What the package logged so far, one string a message."""
    caplog.set_level(logging.INFO, "spectral_ds")
    return lambda level=logging.WARNING: [
        record.getMessage() for record in caplog.records if record.levelno >= level
    ]


def frozen(model, *layers):
    for index in layers:
        model.layers[index].requires_grad_(False)
    return model


# Parameters that come to be trained


def unfreezes(model, optimizer):
    model.layers[2].requires_grad_(True)


def adds_a_group(model, optimizer):
    model.layers[2].requires_grad_(True)
    optimizer.add_param_group({"params": list(model.layers[2].parameters()), "lr": 1.0})


def replaces_a_layer(model, optimizer):
    torch.manual_seed(7)
    model.layers[2] = torch.nn.Linear(6, 6)
    optimizer.add_param_group({"params": list(model.layers[2].parameters())})


CHANGES = {unfreezes: True, adds_a_group: False, replaces_a_layer: False}


@pytest.mark.parametrize("change", CHANGES)
def test_what_comes_to_be_trained_joins_at_the_next_step(change, said):
    model = frozen(Blocks(), 2)
    first = [p for p in model.parameters() if CHANGES[change] or p.requires_grad]
    optimizer = sgd(first)
    plugin = spectral_ds.attach(model, optimizer, SECTION)
    wanted = filtered(model, gradients_of(model))
    assert_is(step_of(model, optimizer), wanted)
    nodes, count = plugin.graph.num_nodes, len(said(logging.INFO))
    change(model, optimizer)
    for _ in range(2):
        gradients = gradients_of(model)
        assert len(gradients) == 6
        if plugin.graph.num_nodes == nodes:  # built anew in this step, of these weights
            built = as_arrays(model, gradients)
        wanted = filtered_on(built, model, gradients)
        assert_is(step_of(model, optimizer), wanted)
    assert plugin.graph.num_nodes == nodes + 7
    [message] = said(logging.INFO)[count:]
    assert "trained from step 1 on: layers.2.weight, layers.2.bias" in message
    assert said() == []


def filtered_on(weights, model, gradients, section=SECTION):
    """As `filtered`, on the graph of weights that there were before."""
    ordered = {name: gradients[name] for name in weights}
    adjacency = oracle.adjacency_of(weights, section["graph"]["edges"])
    response = oracle.response_of(section["filter"], oracle.bound_of(adjacency))
    return oracle.apply_function(oracle.laplacian_of(adjacency), response, ordered)
