"""The loss and the gradient noise scale that the monitor tells, against their definitions."""

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from cells import CELLS, Training

import spectral_ds

BANDS = 4

WITH_LOSS = {"regularizer": {"strength": 0.5}, "monitor": {"interval": 1, "bands": BANDS}}


def observed_by_rank_0():
    """Metrics of two steps, and the loss that rank 0 told in the second."""
    training = Training(CELLS["ddp"], WITH_LOSS, rates=(0.5, 0.25))
    training.step(0)
    metrics = [training.plugin.metrics()]
    if dist.get_rank() == 0:
        training.plugin.observe_loss(torch.tensor(2.0))
        training.plugin.observe_loss(torch.tensor(4.0))
    training.step(1)
    metrics.append(training.plugin.metrics())
    training.close()
    return metrics


def test_a_loss_may_be_observed_by_some_ranks_alone(ranks):
    for silent, told in ranks(2).run(observed_by_rank_0):
        assert "joint_loss" not in silent
        assert told["regularizer"] > 0
        assert told["joint_loss"] == pytest.approx(3.0 + 0.5 * told["regularizer"])


def accumulated_losses(divided):
    """The metrics of a step of two micro-batches, and this rank's losses.

    Args:
        divided: whether the loss is divided by their number, as the Trainer of transformers does.
    """
    training = Training("zero2", WITH_LOSS, accumulation=2)
    engine, losses = training.engine, []
    for tokens in tiny.batches(2):
        loss = engine(tokens)
        losses.append(loss.item())
        if divided:
            engine.backward(loss / 2, scale_wrt_gas=False)
        else:
            engine.backward(loss)
        engine.step()
    metrics = training.plugin.metrics()
    training.close()
    return metrics, losses


@pytest.mark.parametrize("divided", [False, True])
def test_deepspeed_tells_the_whole_loss(ranks, divided):
    results = ranks(2).run(accumulated_losses, divided)
    mean = np.mean([losses for _, losses in results])
    for metrics, _ in results:
        expected = mean + 0.5 * metrics["regularizer"]
        assert metrics["joint_loss"] == pytest.approx(expected, rel=1e-5)


EXAMPLES, BATCH, SIZE = 48, 8, (7, 5)


def examples():
    """Inputs and targets of a linear model, whose targets no weights reach."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(EXAMPLES, SIZE[1], generator=generator)
    goal = torch.randn(SIZE, generator=generator)
    noise = torch.randn(EXAMPLES, SIZE[0], generator=generator)
    return inputs, inputs @ goal.T + 2 * noise


def noise_scales(batches):
    """Gradient noise scale at the last of many steps at fixed weights, batches being drawn."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(SIZE[1], SIZE[0], bias=False))
    weight = model[0].weight.detach().clone()
    world_size = dist.get_world_size()
    section = {
        "preset": "observe",
        "graph": {"edges": [{"family": "ring"}]},
        "statistics": {"interval": 1, "decay": 0.9999},
        "monitor": {"interval": batches - 1, "bands": BANDS},
    }
    engine, *_ = spectral_ds.initialize(
        model=model,
        model_parameters=model.parameters(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        config={
            "train_batch_size": BATCH,
            "train_micro_batch_size_per_gpu": BATCH // world_size,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "spectral_ds": section,
        },
    )
    inputs, targets = examples()
    generator = torch.Generator().manual_seed(4)
    for _ in range(batches):
        drawn = torch.randint(0, EXAMPLES, (BATCH,), generator=generator)
        own = drawn[dist.get_rank() :: world_size]
        engine.backward((engine(inputs[own]) - targets[own]).square().sum(dim=1).mean() / 2)
        engine.step()
    metrics = spectral_ds.plugin_of(engine).metrics()
    engine.destroy()
    return weight.numpy(), metrics["gradient_noise_scale"]


def test_the_noise_scale_is_that_of_the_gradients_of_single_examples(ranks):
    [(weight, estimate)] = ranks(1).run(noise_scales, 401)
    inputs, targets = (each.double().numpy() for each in examples())
    residual = inputs @ weight.astype(np.float64).T - targets
    gradients = (residual[:, :, None] * inputs[:, None, :]).reshape(EXAMPLES, -1)
    mean = gradients.mean(axis=0)
    scale = np.square(gradients - mean).sum(axis=1).mean() / np.square(mean).sum()
    assert scale > BATCH / 4  # a batch holds noise that matters
    assert estimate == pytest.approx(scale, rel=0.1)  # its standard error is 3 %
    [(_, alone)] = ranks(1).run(noise_scales, 101)
    for _, sharded in ranks(2).run(noise_scales, 101):
        assert sharded == pytest.approx(alone, rel=1e-5)
