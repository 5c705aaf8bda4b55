"""What the runner attaches to, when, and that every step's gradient is filtered exactly once."""

import gc
import weakref

import numpy as np
import pytest
import torch
from ring_steps import (
    LIMIT,
    SECTION,
    assert_is,
    backward,
    expected,
    loss_of,
    make_model,
    smoothed,
    step_of,
    warnings_of,
)

import spectral_ds
from spectral_ds.attach.runner import Runner


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


# Loops. Each takes three steps; every one must be filtered once and then clipped.


def clips_twice(model, optimizer):
    backward(model)
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e6)
    torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
    optimizer.step()


def clips_by_the_inner_module(model, optimizer):
    backward(model)
    torch.nn.utils.clip_grad.clip_grad_norm_(max_norm=LIMIT, parameters=iter(model.parameters()))
    optimizer.step()


def clips_in_two_calls(model, optimizer):
    backward(model)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), LIMIT, norm)
    optimizer.step()


def keeps_gradient_tensors(model, optimizer):
    model.zero_grad(set_to_none=False)
    loss_of(model).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
    optimizer.step()


def leaves_out_a_step(model, optimizer):
    """As loops do where the loss was not finite."""
    backward(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
    clips_twice(model, optimizer)


def accumulates(model, optimizer):
    model.zero_grad()
    for _ in range(3):
        (loss_of(model) / 3).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
    optimizer.step()


def is_compiled(model, optimizer):
    torch.compile(clips_twice, backend="eager")(model, optimizer)


@pytest.mark.parametrize(
    "loop",
    [
        clips_twice,
        clips_by_the_inner_module,
        clips_in_two_calls,
        keeps_gradient_tensors,
        leaves_out_a_step,
        accumulates,
        is_compiled,
    ],
)
def test_every_step_is_filtered_once_and_then_clipped(runner, loop):
    model = make_model()
    optimizer = sgd(model.parameters())
    for _ in range(3):
        wanted = expected(model, LIMIT)
        assert_is(step_of(model, lambda: loop(model, optimizer)), wanted)


def test_a_loop_that_does_not_clip_is_filtered_in_the_step(runner, capsys):
    model = make_model()
    optimizer = sgd(model.parameters())
    for _ in range(2):
        backward(model)
        wanted = expected(model)
        assert_is(step_of(model, optimizer.step), wanted)
    assert capsys.readouterr().err == "spectral_ds: attached to SGD of Sequential\n"


@pytest.mark.parametrize("overflows", [0, 1])
def test_a_loss_scale_is_gone_before_the_filter(runner, overflows):
    model = make_model()
    optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu", init_scale=1024.0)

    def take(factor=1.0):
        model.zero_grad()
        scaler.scale(factor * loss_of(model)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        scaler.step(optimizer)
        scaler.update()

    for _ in range(overflows):
        step = step_of(model, lambda: take(float("inf")))
        assert not any(part.any() for part in step)
    wanted = expected(model, LIMIT)
    assert_is(step_of(model, take), wanted)


def test_accelerate_that_accumulates_is_not_filtered_yet(runner, monkeypatch):
    from accelerate.state import GradientState

    model = make_model()
    optimizer = sgd(model.parameters())
    backward(model)
    gradient = model[0].weight.grad.clone()
    monkeypatch.setitem(GradientState._shared_state, "sync_gradients", False)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
    torch.testing.assert_close(model[0].weight.grad, gradient)
    monkeypatch.setitem(GradientState._shared_state, "sync_gradients", True)
    wanted = expected(model, LIMIT)
    assert_is(step_of(model, lambda: clips_twice(model, optimizer)), wanted)


def test_gradients_that_are_clipped_in_every_micro_batch_are_told_once(runner, caplog):
    model = make_model()
    optimizer = sgd(model.parameters())
    for _ in range(2):
        model.zero_grad()
        for _ in range(3):
            loss_of(model).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        optimizer.step()
    (warning,) = warnings_of(caplog)
    assert "after each micro-batch" in warning


def test_loops_that_clip_once_a_step_are_told_nothing(runner, caplog):
    model = make_model()
    optimizer = sgd(model.parameters())
    for loop in (clips_twice, clips_in_two_calls, keeps_gradient_tensors, accumulates) * 2:
        loop(model, optimizer)
    assert warnings_of(caplog) == []


# What is attached.


class Criterion(torch.nn.Module):
    """Holds a model, as losses and trainers that are modules do."""

    def __init__(self, model):
        super().__init__()
        self.model = model


def step(model, optimizer):
    backward(model)
    optimizer.step()


def test_several_models_are_attached_each_once(runner, capsys):
    models = [make_model(seed) for seed in range(2)]
    optimizers = [sgd(model.parameters()) for model in models]
    for _ in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            wanted = expected(model)
            assert_is(step_of(model, lambda m=model, o=optimizer: step(m, o)), wanted)
    assert capsys.readouterr().err.count("attached to SGD of Sequential") == 2


def test_two_optimizers_of_a_module_are_attached_each(runner, capsys):
    model = make_model()
    larger, smaller = sgd(model[0].parameters()), sgd(model[2].parameters())

    def take():
        backward(model)
        smaller.step()
        larger.step()

    for _ in range(2):
        wanted = expected(model)
        assert_is(step_of(model, take), wanted)
    assert capsys.readouterr().err.count("attached to SGD of Sequential") == 2


def test_the_optimizer_of_a_second_phase_takes_over(runner, capsys):
    model = make_model()
    head = sgd(model[2].parameters())
    backward(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
    head.step()
    everything = sgd(model.parameters())
    for _ in range(2):
        wanted = expected(model, LIMIT)
        assert_is(step_of(model, lambda: clips_twice(model, everything)), wanted)
    assert spectral_ds.plugin_of(head) is None
    assert "SGD is detached" in capsys.readouterr().err


class Counting(torch.optim.Adam):
    """Keeps a number of its own beside the states of parameters, as MADGRAD does."""

    def step(self, closure=None):
        self.state["k"] = self.state.get("k", torch.zeros(2)) + 1
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.Adam, Counting])
def test_an_optimizer_that_has_stepped_before_is_told(runner, capsys, kind):
    model = make_model()
    states = []
    for is_resumed in (False, True):
        optimizer = kind(model.parameters(), lr=1e-3)
        if is_resumed:
            optimizer.load_state_dict(states[0])
        backward(model)
        optimizer.step()
        states.append(optimizer.state_dict())
        assert ("it has stepped before" in capsys.readouterr().err) == is_resumed
        spectral_ds.plugin_of(optimizer).detach()


def test_optimizers_of_phases_may_all_be_built_before(runner):
    model = make_model()
    head, everything = sgd(model[2].parameters()), sgd(model.parameters())
    backward(model)
    torch.nn.utils.clip_grad_norm_(model[2].parameters(), LIMIT)
    head.step()
    # The head's gradient is filtered for the first optimizer, when nobody knows of the next step.
    gradients = torch.autograd.grad(loss_of(model), list(model.parameters()))
    wanted = [g.numpy() for g in gradients[:2]] + [smoothed(g) for g in gradients[2:]]
    norm = np.sqrt(sum((part**2).sum() for part in wanted))
    wanted = [part * LIMIT / norm for part in wanted]
    assert_is(step_of(model, lambda: clips_twice(model, everything)), wanted)
    wanted = expected(model, LIMIT)
    assert_is(step_of(model, lambda: clips_twice(model, everything)), wanted)


def test_an_optimizer_inside_another_is_not_attached_too(runner, capsys):
    class Outer(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, lr=1.0)
            self.inner = sgd(self.param_groups[0]["params"])

        def step(self, closure=None):
            self.inner.step()

    model = make_model()
    optimizer = Outer(model.parameters())
    for _ in range(2):
        wanted = expected(model, LIMIT)
        assert_is(step_of(model, lambda: clips_twice(model, optimizer)), wanted)
    assert capsys.readouterr().err == "spectral_ds: attached to SGD of Sequential\n"


def test_a_module_that_holds_the_model_is_attached_whole(runner, capsys):
    criterion = Criterion(make_model())
    optimizer = sgd(criterion.model.parameters())
    step(criterion.model, optimizer)
    assert "attached to SGD of Criterion" in capsys.readouterr().err
    assert "model.0.weight" in spectral_ds.plugin_of(criterion).engine.shapes


def test_parameters_outside_of_the_module_are_counted(runner, capsys):
    model, temperature = make_model(), torch.nn.Parameter(torch.ones(()))
    optimizer = sgd([*model.parameters(), temperature])
    step(model, optimizer)
    assert "(but not 1 of its 5 parameters" in capsys.readouterr().err


def test_parameters_of_no_module_are_a_reason(runner, capsys):
    tensor = torch.nn.Parameter(torch.ones(3))
    tensor.grad = torch.ones(3)
    sgd([tensor]).step()
    printed = capsys.readouterr().err
    assert "NOTHING IS ATTACHED" in printed
    assert "no torch module" in printed


def test_what_the_program_attaches_itself_is_left_to_it(runner, capsys):
    model = make_model()
    optimizer = sgd(model.parameters())
    plugin = spectral_ds.attach(model, optimizer, SECTION)
    wanted = expected(model, LIMIT)

    def take():
        backward(model)
        plugin.filter_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        optimizer.step()

    assert_is(step_of(model, take), wanted)
    assert spectral_ds.plugin_of(model) is plugin
    assert capsys.readouterr().err == ""


def test_a_model_that_gc_freeze_hides_is_found(runner):
    model = make_model()
    optimizer = sgd(model.parameters())
    gc.freeze()
    try:
        clips_twice(model, optimizer)
    finally:
        gc.unfreeze()
    assert spectral_ds.plugin_of(model) is not None


def test_nothing_is_kept_alive(runner):
    model = make_model()
    optimizer = sgd(model.parameters())
    clips_twice(model, optimizer)
    references = [weakref.ref(thing) for thing in (model, optimizer)]
    references.append(weakref.ref(spectral_ds.plugin_of(model)))
    del model, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_after_the_end_gradients_are_those_of_torch():
    runner = Runner(spectral_ds.load_config(SECTION))
    runner.watch()
    clip, model = torch.nn.utils.clip_grad_norm_, make_model()
    optimizer = sgd(model.parameters())
    clips_twice(model, optimizer)
    runner.stop()
    gradients = torch.autograd.grad(loss_of(model), list(model.parameters()))

    def take():
        backward(model)
        clip(model.parameters(), 1e9)  # the replacement, that somebody kept
        optimizer.step()

    assert_is(step_of(model, take), [gradient.numpy() for gradient in gradients])
    assert spectral_ds.plugin_of(model) is None
