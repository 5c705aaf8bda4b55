"""Updates that the plugin smooths, and weights that it pulls: as dense float64 training does."""

import functools

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from cells import CELLS, Training
from oracle import role_and_block

# A larger epsilon, so that rounding of small gradients stays small; no decay, which DeepSpeed gives
# to unused parameters too.
ADAM = functools.partial(torch.optim.AdamW, eps=1e-3, weight_decay=0.0)
RETAIN_RATES = (7e-4, 3.5e-4)
RETAIN_STEPS = 4

SMOOTH_AND_PULL = {
    "preset": "gradient_smoothing",
    "regularizer": {"strength": 300.0, "ridge": 0.4, "coupling": "decoupled"},
}


def retained(name, device):
    """Weights after some steps of AdamW, smoothed over depth and pulled back; and the reference.

    Of that where it lies, how precise it is, and whether in the memory of the weights.
    """
    regularizer = {**SMOOTH_AND_PULL["regularizer"], "reference_device": device}
    section = {**SMOOTH_AND_PULL, "regularizer": regularizer}
    training = Training(CELLS[name], section, ADAM, RETAIN_RATES)
    plugin = training.plugin
    held = [part for part in plugin.stack.regularizer.reference.fragments if part is not None]
    kinds = {(part.device.type, part.dtype) for part in held}
    is_shared = not memory_of(held).isdisjoint(memory_of(plugin.engine.weights()))
    for index in range(RETAIN_STEPS):
        training.step(index)
    weights = training.snapshot()
    training.close()
    return weights, kinds, is_shared


def memory_of(tensors):
    return {each.untyped_storage().data_ptr() for each in tensors if each.numel() > 0}


def retained_by_hand(alpha=0.4, strength=300.0, ridge=0.4):
    """The same on one process in float64, and the weights before."""
    module = tiny.TinyLlama(torch.float64)
    stepper = ADAM(tiny.parameter_groups(module, RETAIN_RATES))
    rate_of = {id(p): group["lr"] for group in stepper.param_groups for p in group["params"]}
    roles = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and tiny.is_filtered(name):
            roles.setdefault(role_and_block(name)[0], []).append(parameter)
    stacks = {role: torch.stack(list(members)).detach() for role, members in roles.items()}
    reference = dict(stacks)
    before = {n: p.detach().numpy().copy() for n, p in module.named_parameters()}
    for index in range(RETAIN_STEPS):
        module(tiny.batches(1, index)[0]).backward()
        stepper.step()
        stepper.zero_grad()
        for role, members in roles.items():
            count = len(members)
            path = torch.zeros(count, count, dtype=torch.float64)
            for block in range(count - 1):
                pair = torch.tensor([block, block + 1])
                path[pair, pair] += 1
                path[pair, pair.flip(0)] -= 1
            identity = torch.eye(count, dtype=torch.float64)
            rates = torch.tensor([rate_of[id(p)] for p in members], dtype=torch.float64)
            moved = torch.stack(list(members)).detach() - stacks[role]
            smooth = torch.tensordot(identity - alpha / 2 * path, moved, dims=1)
            weights = stacks[role] + smooth
            pull = torch.diag(rates * strength) @ (path + ridge * identity)
            stacks[role] = weights - torch.tensordot(pull, weights - reference[role], dims=1)
            with torch.no_grad():
                for parameter, value in zip(members, stacks[role], strict=True):
                    parameter.copy_(value)
    return {n: p.detach().numpy().copy() for n, p in module.named_parameters()}, before


def distance(some, others):
    """NaN if any is, so that no bound holds."""
    return np.max([np.abs(some[n] - others[n]).max() for n in some])


@pytest.fixture(scope="module")
def by_hand(ranks):
    expected, before = ranks(1).run(retained_by_hand)[0]
    assert distance(expected, before) > 1e-3
    for changed in ((0.0, 300.0, 0.4), (0.4, 0.0, 0.4), (0.4, 300.0, 0.0)):
        assert distance(ranks(1).run(retained_by_hand, *changed)[0][0], expected) > 1e-4
    return expected


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("zero0", "cpu"),
        ("zero1", "same"),
        ("zero2-offload", "same"),
        ("zero3", "cpu"),
        ("fsdp2", "cpu"),
        ("ddp", "same"),
    ],
)
def test_updates_are_smoothed_over_depth_and_pulled_back(ranks, by_hand, name, device):
    for weights, kinds, is_shared in ranks(2).run(retained, name, device):
        assert distance(by_hand, weights) <= 1e-6
        assert not is_shared
        if device == "cpu":
            assert kinds == {("cpu", torch.float32)}


FUSED = functools.partial(torch.optim.AdamW, fused=True)
LEAVES_TRACES = {
    **SMOOTH_AND_PULL,
    "filter": {"temporal": {"decay": 0.5, "amplify": 1.0}},
    "regularizer": {**SMOOTH_AND_PULL["regularizer"], "reference": "zero", "strength": 30.0},
}


def steps_scaled_by_torch(name, factors, unscales, scale):
    """Whether each step, of a loss times its factor on rank 0, moves weights; those at last."""
    training = Training(CELLS[name], LEAVES_TRACES, FUSED, RETAIN_RATES)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
    moves = []
    for index, factor in factors:
        before = training.snapshot()
        loss = training.wrapped(tiny.batches(1, index)[0])
        scaler.scale(loss * (factor if dist.get_rank() == 0 else 1.0)).backward()
        if unscales:
            scaler.unscale_(training.optimizer)
            training.plugin.filter_gradients()
        scaler.step(training.optimizer)
        scaler.update()
        training.optimizer.zero_grad()
        after = training.snapshot()
        moves.append(any(not np.array_equal(after[n], before[n]) for n in after))
    training.close()
    return moves, after


@pytest.mark.parametrize(
    ("name", "world_size", "unscales"),
    [
        ("plain", 1, False),
        ("ddp", 2, True),
        ("fsdp2", 2, False),
        ("fsdp2", 2, True),
        ("hsdp", 4, False),
    ],
)
def test_a_step_that_a_fused_optimizer_skips_leaves_no_trace(ranks, name, world_size, unscales):
    sound, overflows = [(0, 1.0), (2, 1.0)], [(0, 1.0), (1, torch.inf), (2, 1.0)]
    _, expected = ranks(world_size).run(steps_scaled_by_torch, name, sound, False, 1.0)[0]
    for moves, weights in ranks(world_size).run(
        steps_scaled_by_torch, name, overflows, unscales, 64.0
    ):
        assert moves == [True, False, True]
        assert distance(weights, expected) <= 1e-6
