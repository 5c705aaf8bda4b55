"""A model whose gradients are set by hand, in this process, and what the plugin makes of them.

In: a section. Out: gradients before and after the filter, weights after a step.
"""

import logging
from contextlib import contextmanager

import numpy as np
import torch

import spectral_ds


class Blocks(torch.nn.Sequential):
    """Blocks of equal shape; nobody calls it."""

    def __init__(self, blocks=5):
        torch.manual_seed(0)
        super().__init__(*(torch.nn.Linear(6, 12) for _ in range(blocks)))


def gradients_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n: torch.randn(p.shape, generator=generator) for n, p in named.items()}


def smooth_gradients(model, seed):
    """Signal that columns and rows share, and noise."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in model.named_parameters():
        signal = torch.linspace(0, 3, parameter.numel()).view(parameter.shape).sin()
        found[name] = signal + torch.randn(parameter.shape, generator=generator)
    return found


def set_gradients(model, gradients):
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone() if name in gradients else None


def gradients_now(model):
    return {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}


@contextmanager
def attached(model, section, optimizer=torch.optim.SGD):
    """The model's optimizer and plugin."""
    stepper = optimizer(model.parameters(), lr=0.1)
    plugin = spectral_ds.attach(model, stepper, section)
    yield stepper, plugin
    plugin.detach()


def filtered_by_hand(section, model=None):
    """Gradients before and after one filter, and the graphs."""
    model = model or Blocks()
    gradients = gradients_of(model)
    with attached(model, section) as (_, plugin):
        set_gradients(model, gradients)
        plugin.filter_gradients()
        graphs = [stage.graph for stage in plugin.stack.graphs]
    return {n: g.numpy() for n, g in gradients.items()}, gradients_now(model), graphs


def check(filtered, expected, tolerance=1e-5):
    assert filtered.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(filtered[name], value, atol=tolerance, err_msg=name)


SIMILARITY = [{"family": "similarity", "neighbours": 3}]


class Messages(logging.Handler):
    """What the plugin says about its graph, by the levels that there are."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.verdicts = []

    def emit(self, record):
        if "this graph" in record.getMessage():
            self.verdicts.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("spectral_ds").addHandler(self)
        return self

    def __exit__(self, *failure):
        logging.getLogger("spectral_ds").removeHandler(self)
