"""One step of a plain model by SGD, and the gradients that it was made of."""

import numpy as np
import torch

import spectral_ds

RATE = 64.0  # large, so that weights before minus after hold the gradient precisely


def one_step(model, section, loss=None):
    """(weights before, gradients, weights before minus after, plugin), by name; float64."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    before = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
    plugin = spectral_ds.attach(model, optimizer, section)
    if loss is None:  # any gradient will do
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    else:
        loss(model).backward()
    gradients = {n: p.grad.double().numpy().copy() for n, p in model.named_parameters()}
    optimizer.step()
    after = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    return before, gradients, {n: (before[n] - after[n]) / RATE for n in before}, plugin


def assert_close(found, expected):
    for name, right in expected.items():
        assert np.abs(found[name] - right).max() <= 1e-5 * np.abs(right).max(), name
