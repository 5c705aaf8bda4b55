"""The optimizers that only comparisons use, against the algorithms written out in float64."""

import numpy as np
import pytest
import torch

from spectral_ds.cli.compare.optimizers import (
    HalfWhitened,
    ProjectionDecay,
    half_whitened,
    optimizers_of,
)

BETAS, EPSILON, RATE = (0.9, 0.999), 1e-8, 0.05


def adam_steps(start, gradients, after):
    """AdamW without decay in numpy; `after(before, stepped, gradient)` gives the next weights."""
    weights, mean, power = start.copy(), 0.0, 0.0
    for step, gradient in enumerate(gradients, start=1):
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        power = BETAS[1] * power + (1 - BETAS[1]) * gradient**2
        size = np.sqrt(power / (1 - BETAS[1] ** step)) + EPSILON
        stepped = weights - RATE * mean / (1 - BETAS[0] ** step) / size
        weights = after(weights, stepped, gradient)
    return weights


def steps_of(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient).float()
        optimizer.step()
    return parameter.detach().double().numpy()


@pytest.fixture
def case():
    random = np.random.default_rng(0)
    start = random.normal(size=(4, 6))
    # Momentum leads away although the fourth and fifth gradient speak against it.
    away = random.normal(size=(4, 6))
    gradients = [
        sign * away + 0.1 * random.normal(size=(4, 6)) for sign in (1, 1, 1, -0.2, -0.2, 1)
    ]
    return start, gradients


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_projection_decay_takes_back_what_the_gradient_speaks_against(case, strength):
    start, gradients = case
    taken_back = []

    def after(before, stepped, gradient):
        far = np.linalg.norm(before - start)
        change = stepped - start
        now = np.linalg.norm(change)
        if not (gradient * (before - start)).sum() > 0:
            return stepped
        ratio = min(1.0, max(0.0, (now - far) / now))
        taken_back.append(ratio)
        return stepped - strength * ratio * change

    expected = adam_steps(start, gradients, after)
    parameter = torch.nn.Parameter(torch.from_numpy(start).float())
    optimizer = ProjectionDecay([parameter], lr=RATE, weight_decay=0.0, strength=strength)
    assert max(taken_back) > 0
    np.testing.assert_allclose(steps_of(optimizer, parameter, gradients), expected, atol=1e-5)


def whitened(x):
    u, s, v = np.linalg.svd(x, full_matrices=False)
    half = u * np.sqrt(s) @ v
    return half * np.linalg.norm(x) / np.linalg.norm(half)


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3)])
def test_half_whitening_takes_the_root_of_singular_values_at_equal_norm(shape):
    x = np.random.default_rng(1).normal(size=shape)
    np.testing.assert_allclose(half_whitened(torch.from_numpy(x)), whitened(x), atol=1e-10)


def test_half_whitening_leaves_directions_without_energy_and_zero_alone():
    x = np.outer(np.arange(1.0, 5), np.arange(1.0, 4))
    np.testing.assert_allclose(half_whitened(torch.from_numpy(x)), x, atol=1e-10)
    assert not half_whitened(torch.zeros(3, 4)).any()


def test_half_whitened_is_adamw_with_such_updates(case):
    start, gradients = case
    expected = adam_steps(start, gradients, lambda w, stepped, _: w + whitened(stepped - w))
    parameter = torch.nn.Parameter(torch.from_numpy(start).float())
    optimizer = HalfWhitened([parameter], lr=RATE, weight_decay=0.0)
    np.testing.assert_allclose(steps_of(optimizer, parameter, gradients), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon", "projection_decay", "half_whitened"])
def test_every_parameter_belongs_to_one_optimizer(name):
    model = torch.nn.ModuleDict(
        {
            "embeddings": torch.nn.Embedding(4, 3),
            "layers": torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 5)]),
        }
    )
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    found = optimizers_of(name, dict(model.named_parameters()), RATE, {})
    held = [[id(p) for group in each.param_groups for p in group["params"]] for each in found]
    assert sorted(p for each in held for p in each) == sorted(map(id, model.parameters()))
    if name in ("muon", "half_whitened"):
        assert held[0] == [id(layer.weight) for layer in model["layers"]]
