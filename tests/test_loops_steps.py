"""Ways to call a step: what it changes is filtered exactly once, or the user is told."""

import numpy as np
import pytest
import torch
from ring_steps import (
    LIMIT,
    SECTION,
    SGD,
    UPDATE,
    assert_filtered_once,
    assert_is,
    attached,
    backward,
    expected,
    loss_of,
    make_model,
    smoothed,
    step_of,
    warnings_of,
)

import spectral_ds

# Nested calls.


class Twice(SGD):
    """A subclass whose step is also its base class's, of which torch runs the hooks, too."""

    fails = False

    def step(self, closure=None):
        loss = super().step(closure)
        if self.fails:
            raise RuntimeError("no step")
        return loss


@pytest.mark.parametrize("section", [SECTION, UPDATE], ids=["gradient", "update"])
def test_a_step_that_calls_its_base_class_is_one_step(section):
    SGD([torch.nn.Parameter(torch.ones(1))])  # from now on torch hooks its step
    model, optimizer, plugin = attached(Twice, section)

    def take():
        backward(model)
        optimizer.step()

    assert_filtered_once(model, plugin, take)


def test_a_filter_that_fails_leaves_the_weights_of_the_base_optimizer(monkeypatch):
    model, optimizer, plugin = attached(SGD, UPDATE)
    wanted = [g.numpy() for g in torch.autograd.grad(loss_of(model), list(model.parameters()))]
    monkeypatch.setattr(plugin.stack.filter, "move", lambda *_: False)
    monkeypatch.setattr(plugin.stack.filter, "apply", lambda *_: 1 / 0)
    backward(model)

    def take():
        with pytest.raises(ZeroDivisionError):
            optimizer.step()

    assert_is(step_of(model, take), wanted)


@pytest.mark.parametrize("section", [SECTION, UPDATE], ids=["gradient", "update"])
def test_after_a_step_that_raised_the_next_is_filtered_once(section):
    SGD([torch.nn.Parameter(torch.ones(1))])
    model, optimizer, plugin = attached(Twice, section)
    kept = []  # the error, and by its traceback the frames of the step
    for _ in range(2):
        optimizer.fails = True
        backward(model)
        try:
            optimizer.step()
        except RuntimeError as error:
            kept.append(error)
        optimizer.fails = False
    assert plugin.engine.step == 0
    assert_filtered_once(model, plugin, lambda: (backward(model), optimizer.step()), steps=2)


@pytest.mark.parametrize("optimizer", [SGD, Twice])
def test_a_compiled_step_is_filtered_once(optimizer):
    model, optimizer, plugin = attached(optimizer)
    compiled = torch.compile(optimizer.step, backend="eager")
    assert_filtered_once(model, plugin, lambda: (backward(model), compiled()), steps=2)


def test_a_loop_that_filters_by_hand_may_go_on_after_detaching():
    model, optimizer, plugin = attached(SGD)
    plugin.detach()
    gradients = torch.autograd.grad(loss_of(model), list(model.parameters()))

    def take():
        backward(model)
        plugin.filter_gradients()
        optimizer.step()

    assert_is(step_of(model, take), [gradient.numpy() for gradient in gradients])


def test_a_compiled_loop_may_filter_by_hand():
    graph = {**SECTION["graph"], "refresh_interval": 1}
    model, optimizer, plugin = attached(SGD, {**SECTION, "graph": graph})

    @torch.compile(backend="eager")
    def take():
        backward(model)
        plugin.filter_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        optimizer.step()

    assert_filtered_once(model, plugin, take, limit=LIMIT)


def test_the_runner_attaches_after_a_step_that_raised(runner, capsys):
    SGD([torch.nn.Parameter(torch.ones(1))])
    model = make_model()
    failing = Twice([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    failing.fails, kept = True, []
    try:
        failing.step()
    except RuntimeError as error:
        kept.append(error)
    optimizer = SGD(model.parameters(), lr=1.0)
    wanted = expected(model)
    assert_is(step_of(model, lambda: (backward(model), optimizer.step())), wanted)
    assert "attached to SGD of Sequential" in capsys.readouterr().err


def test_the_runner_attaches_to_a_step_in_the_closure_of_another(runner, capsys):
    models = make_model(), make_model()
    outer, inner = (SGD(model.parameters(), lr=1.0) for model in models)
    wanted = expected(models[1])

    def closure():
        backward(models[1])
        inner.step()
        return backward(models[0])

    assert_is(step_of(models[1], lambda: outer.step(closure)), wanted)
    assert capsys.readouterr().err.count("attached to SGD of Sequential") == 2


# Closures.


def zeroes_inside(model, optimizer):
    optimizer.step(lambda: backward(model))


def zeroes_before(model, optimizer):
    def closure():
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.zero_grad()
    optimizer.step(closure=closure)


def keeps_gradient_tensors(model, optimizer):
    def closure():
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)


def returns_the_loss_alone(model, optimizer):
    loss = backward(model)
    optimizer.step(lambda: loss)


CLOSURES = [zeroes_inside, zeroes_before, keeps_gradient_tensors, returns_the_loss_alone]


@pytest.mark.parametrize("loop", CLOSURES, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("section", [SECTION, UPDATE], ids=["gradient", "update"])
@pytest.mark.parametrize("optimizer", [SGD, Twice])
def test_the_gradient_of_a_closure_is_filtered_once(loop, section, optimizer):
    SGD([torch.nn.Parameter(torch.ones(1))])
    model, optimizer, plugin = attached(optimizer, section)
    assert_filtered_once(model, plugin, lambda: loop(model, optimizer))


def test_the_runner_filters_the_gradient_of_a_closure(runner, capsys):
    model = make_model()
    optimizer = SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        wanted = expected(model)
        assert_is(step_of(model, lambda: zeroes_inside(model, optimizer)), wanted)
    assert capsys.readouterr().err == "spectral_ds: attached to SGD of Sequential\n"


def test_the_runner_filters_before_a_closure_clips(runner):
    model = make_model()
    optimizer = SGD(model.parameters(), lr=1.0)

    def closure():
        loss = backward(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        return loss

    for _ in range(3):
        wanted = expected(model, LIMIT)
        assert_is(step_of(model, lambda: optimizer.step(closure)), wanted)


@pytest.mark.parametrize("is_inside", [True, False])
def test_gradients_filtered_by_hand_are_left_alone_in_a_closure(is_inside):
    model, optimizer, plugin = attached(SGD)

    def clip():
        loss = backward(model)
        plugin.filter_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        return loss

    def take():
        loss = None if is_inside else clip()
        optimizer.step(clip if is_inside else lambda: loss)

    assert_filtered_once(model, plugin, take, limit=LIMIT)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("is_by_hand", [False, True])
def test_every_gradient_of_lbfgs_is_filtered_once(search, is_by_hand, caplog):
    options = {"max_iter": 4, "line_search_fn": search}
    model, optimizer, plugin = attached(torch.optim.LBFGS, **options)
    dense = make_model()
    other = torch.optim.LBFGS(dense.parameters(), lr=1.0, **options)

    def closure():
        loss = backward(model)
        if is_by_hand:
            plugin.filter_gradients()
        return loss

    def filtered_by_the_oracle():
        loss = backward(dense)
        for parameter in dense.parameters():
            parameter.grad.copy_(torch.from_numpy(smoothed(parameter.grad)))
        return loss

    for step in range(2):
        assert plugin.engine.step == step
        optimizer.step(closure)
        other.step(filtered_by_the_oracle)
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert warnings_of(caplog) == []


def test_evaluations_of_one_step_are_measured_and_averaged_once(monkeypatch):
    section = {
        **SECTION,
        "filter": {**SECTION["filter"], "temporal": {"decay": 0.5, "amplify": 1.0}},
        "monitor": {"interval": 1},
    }
    model, optimizer, plugin = attached(torch.optim.LBFGS, section, max_iter=3)
    first, counts = [], {"shown": 0, "taken": 0, "evaluated": 0}
    report, take = plugin.monitor._report, plugin.stack.graphs[0].samples.take

    def counted(name, original):
        def call(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(plugin.monitor, "_report", counted("shown", report))
    monkeypatch.setattr(plugin.stack.graphs[0].samples, "take", counted("taken", take))

    def closure():
        counts["evaluated"] += 1
        loss = backward(model)
        if counts["evaluated"] == 1:
            first.extend(smoothed(p.grad) for p in model.parameters())
        return loss

    optimizer.step(closure)
    assert counts["evaluated"] >= 3
    assert (counts["shown"], counts["taken"]) == (1, 1)
    assert plugin.metrics()["step"] == 0
    for mean, wanted in zip(plugin.stack.filter.temporal.means, first, strict=True):
        np.testing.assert_allclose(mean.numpy(), wanted.ravel(), rtol=1e-4, atol=1e-5)


def test_parameters_that_the_closure_does_not_use_stay():
    """Gradients of before the closure are stale, and tell nothing of what it uses."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Linear(5, 5))
    optimizer = SGD(model.parameters(), lr=1.0)
    spectral_ds.attach(model, optimizer, {**UPDATE, "graph": {"edges": [{"family": "depth"}]}})
    backward(model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model[0])
        loss.backward()
        return loss

    gradients = torch.autograd.grad(loss_of(model[0]), list(model[0].parameters()))
    step = step_of(model, lambda: optimizer.step(closure))
    # (I + 2 L)⁻¹ of two joined nodes is ((3, 2), (2, 3)) / 5; the other counts as zeros.
    assert_is(step[:2], [0.6 * gradient.numpy() for gradient in gradients])
    assert not any(part.any() for part in step[2:])


class Ignores(SGD):
    def step(self, closure=None):
        super().step()


class IgnoresAlone(SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad)


def test_a_closure_that_is_not_evaluated_is_told(caplog):
    model, optimizer, _ = attached(IgnoresAlone)
    for _ in range(2):
        backward(model)
        optimizer.step(lambda: None)
    (warning,) = warnings_of(caplog)
    assert "IgnoresAlone was given a closure and did not evaluate it" in warning


def test_an_inner_step_without_the_closure_is_filtered():
    SGD([torch.nn.Parameter(torch.ones(1))])
    model, optimizer, plugin = attached(Ignores)
    assert_filtered_once(
        model, plugin, lambda: (backward(model), optimizer.step(lambda: backward(model)))
    )


# Steps inside backward.


def step_inside_backward(model):
    optimizers = {parameter: SGD([parameter], lr=1.0) for parameter in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    return optimizers


def test_the_runner_refuses_steps_inside_backward_once(runner, capsys):
    model = make_model()
    optimizers = step_inside_backward(model)
    gradients = torch.autograd.grad(loss_of(model), list(model.parameters()))
    for _ in range(2):
        step = step_of(model, lambda: loss_of(model).backward())
        if gradients:
            assert_is(step, [gradient.numpy() for gradient in gradients])
        gradients = None
    printed = capsys.readouterr().err
    assert "NOTHING IS ATTACHED" in printed
    assert printed.count("its step runs inside the backward pass") == 1
    assert all(spectral_ds.plugin_of(each) is None for each in optimizers.values())


def test_a_step_inside_backward_is_an_error_where_the_plugin_is_attached():
    model = make_model()
    optimizer = next(iter(step_inside_backward(model).values()))
    spectral_ds.attach(model, optimizer, SECTION)
    with pytest.raises(spectral_ds.UnsupportedEngineError, match="inside the backward pass"):
        loss_of(model).backward()
