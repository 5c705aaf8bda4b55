"""A small model by SGD with learning rate 1, and what a ring of rows makes of each step.

In: a section on the ring. Out: the dense oracle's steps, and a check that a loop takes just these.
"""

import logging

import numpy as np
import torch

import spectral_ds

SECTION = {
    "graph": {"edges": [{"family": "ring"}]},
    "filter": {"response": "tikhonov", "tau": 2.0, "strength": 1.0, "tolerance": 1e-7},
    "monitor": {"enabled": False},
}
UPDATE = {**SECTION, "filter": {**SECTION["filter"], "apply_to": "update"}}
LIMIT = 0.5
INPUTS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
SGD = torch.optim.SGD


def make_model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 4))


def loss_of(model):
    return model(INPUTS).square().sum()


def backward(model):
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return loss


def smoothed(matrix):
    """(I + 2 L)⁻¹ G, L of the ring of the rows, normalized; a vector is one node and stays."""
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim == 1:
        return matrix
    ahead = np.roll(np.eye(len(matrix)), 1, axis=0)
    laplacian = np.eye(len(matrix)) - (ahead + ahead.T) / 2
    return np.linalg.solve(np.eye(len(matrix)) + 2 * laplacian, matrix)


def expected(model, limit=None):
    """The next step of SGD with learning rate 1: filtered once, then clipped."""
    steps = [smoothed(g) for g in torch.autograd.grad(loss_of(model), list(model.parameters()))]
    norm = np.sqrt(sum((step**2).sum() for step in steps))
    factor = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
    return [factor * step for step in steps]


def step_of(model, take):
    """What a step subtracted from the weights."""
    before = [p.detach().clone() for p in model.parameters()]
    take()
    return [(b - p.detach()).numpy() for b, p in zip(before, model.parameters(), strict=True)]


def assert_is(step, wanted):
    for got, value in zip(step, wanted, strict=True):
        np.testing.assert_allclose(got, value, atol=1e-5 * max(np.abs(v).max() for v in wanted))


def assert_filtered_once(model, plugin, take, steps=3, limit=None):
    """Each step is that of the oracle, and is counted once."""
    for _ in range(steps):
        wanted, number = expected(model, limit), plugin.engine.step
        assert_is(step_of(model, take), wanted)
        assert plugin.engine.step == number + 1


def attached(optimizer, section=SECTION, **options):
    """A model, an optimizer of it with the learning rate 1, and the plugin."""
    model = make_model()
    made = optimizer(model.parameters(), lr=1.0, **options)
    return model, made, spectral_ds.attach(model, made, section)


def warnings_of(caplog):
    return [each.message for each in caplog.records if each.levelno == logging.WARNING]
