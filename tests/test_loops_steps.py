"""Every way to call a step: what it changes is filtered exactly once, or the user is told."""

import logging

import numpy as np
import pytest
import torch

import spectral_ds
from spectral_ds.attach.runner import Runner

SECTION = {
    "graph": {"edges": [{"family": "ring"}]},
    "filter": {"response": "tikhonov", "tau": 2.0, "strength": 1.0, "tolerance": 1e-7},
    "monitor": {"enabled": False},
}
UPDATE = {**SECTION, "filter": {**SECTION["filter"], "apply_to": "update"}}
LIMIT = 0.5
INPUTS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
SGD = torch.optim.SGD


def make_model():
    torch.manual_seed(0)
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


@pytest.fixture
def runner():
    """A runner that watches."""
    watching = Runner(spectral_ds.load_config(SECTION))
    watching.watch()
    yield watching
    watching.stop()


def attached(optimizer, section=SECTION, **options):
    """A model, an optimizer of it with the learning rate 1, and the plugin."""
    model = make_model()
    made = optimizer(model.parameters(), lr=1.0, **options)
    return model, made, spectral_ds.attach(model, made, section)


def warnings_of(caplog):
    return [each.message for each in caplog.records if each.levelno == logging.WARNING]


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


# Two half-steps.


class SharpnessAware(torch.optim.Optimizer):
    """As the widely used one: climbs by the first gradient, descends by the second."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"rho": 0.05})
        self.base_optimizer = SGD(self.param_groups, lr=lr)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        parameters = self.param_groups[0]["params"]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old"] = p.clone()
            p.add_(0.05 * p.grad / norm)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


def descended(model):
    """The gradient at the weights after the climb, filtered."""
    climbed = make_model()
    climbed.load_state_dict(model.state_dict())
    backward(climbed)
    norm = torch.stack([p.grad.norm() for p in climbed.parameters()]).norm()
    with torch.no_grad():
        for parameter in climbed.parameters():
            parameter.add_(0.05 * parameter.grad / norm)
    return expected(climbed)


def by_halves(model, optimizer):
    backward(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
    optimizer.first_step(zero_grad=True)
    loss_of(model).backward()
    optimizer.second_step(zero_grad=True)


def by_a_closure(model, optimizer):
    backward(model)
    optimizer.step(lambda: backward(model))


@pytest.mark.parametrize("loop", [by_halves, by_a_closure], ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("section", [SECTION, UPDATE], ids=["gradient", "update"])
def test_of_two_half_steps_the_descent_is_filtered(loop, section):
    model, optimizer, plugin = attached(SharpnessAware, section)
    for number in range(2):
        wanted = descended(model)
        assert_is(step_of(model, lambda: loop(model, optimizer)), wanted)
        assert plugin.engine.step == number + 1


@pytest.mark.parametrize("loop", [by_halves, by_a_closure], ids=lambda loop: loop.__name__)
def test_the_runner_filters_the_descent_of_two_half_steps(runner, capsys, loop):
    model = make_model()
    optimizer = SharpnessAware(model.parameters(), lr=1.0)
    for _ in range(2):
        wanted = descended(model)
        assert_is(step_of(model, lambda: loop(model, optimizer)), wanted)
    assert capsys.readouterr().err == "spectral_ds: attached to SGD of Sequential\n"


def test_a_gradient_filtered_by_hand_and_climbed_by_is_not_the_one_descended():
    model, optimizer, plugin = attached(SharpnessAware, {**SECTION, "filter": {"strength": 1.0}})

    def loop(is_by_hand):
        for half in (optimizer.first_step, optimizer.second_step):
            loss_of(model).backward()
            if half == optimizer.first_step or is_by_hand:
                plugin.filter_gradients()
            half(zero_grad=True)

    start = {name: value.clone() for name, value in model.state_dict().items()}
    steps = []
    for is_by_hand in (False, True):
        model.load_state_dict(start)
        steps.append(step_of(model, lambda by=is_by_hand: loop(by)))
    assert_is(*steps)


class HalvesAlone(SGD):
    def first_step(self):
        pass

    def second_step(self):
        pass


def test_half_steps_of_its_own_are_refused():
    with pytest.raises(spectral_ds.UnsupportedEngineError, match="HalvesAlone takes two half-step"):
        attached(HalvesAlone)


class Climbs(SGD):
    """Both halves in one step, without an optimizer inside; nothing tells that it is such."""

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        parameters = self.param_groups[0]["params"]
        closure()
        old = [p.clone() for p in parameters]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            p.add_(0.05 * p.grad / norm)
        loss = closure()
        for p, value in zip(parameters, old, strict=True):
            p.copy_(value - p.grad)
        return loss


def test_an_unknown_optimizer_of_several_evaluations_is_told_once(caplog):
    model, optimizer, _ = attached(Climbs)
    for _ in range(2):
        optimizer.step(lambda: backward(model))
    (warning,) = warnings_of(caplog)
    assert "Climbs evaluates its closure several times in a step" in warning
    assert "filter.apply_to: update" in warning


def test_updates_of_an_unknown_optimizer_of_several_evaluations_are_filtered_once(caplog):
    model, optimizer, plugin = attached(Climbs, UPDATE)
    for number in range(2):
        wanted = descended(model)
        assert_is(step_of(model, lambda: optimizer.step(lambda: backward(model))), wanted)
        assert plugin.engine.step == number + 1
    assert warnings_of(caplog) == []


# Wrappers.


class LookAhead:
    """Takes fast steps by the optimizer inside; no torch optimizer, and no hooks."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.state_dict, self.load_state_dict = optimizer.state_dict, optimizer.load_state_dict

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)


class WrapperWithoutInit(torch.optim.Optimizer):
    def __init__(self, base_optimizer):
        self.base_optimizer = base_optimizer

    @property
    def param_groups(self):
        return self.base_optimizer.param_groups

    def step(self, closure=None):
        return self.base_optimizer.step(closure)


def accelerated(optimizer):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare_optimizer(optimizer)


@pytest.fixture
def accelerate_forgotten():
    """Accelerate keeps its state in the process."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("wrap", [LookAhead, WrapperWithoutInit, accelerated])
@pytest.mark.usefixtures("accelerate_forgotten")
def test_wrappers_are_taken_off(wrap):
    model = make_model()
    optimizer = wrap(LookAhead(SGD(model.parameters(), lr=1.0)))
    plugin = spectral_ds.attach(model, optimizer, SECTION)
    assert spectral_ds.plugin_of(optimizer) is plugin
    assert_filtered_once(model, plugin, lambda: (backward(model), optimizer.step()))
    plugin.detach()
    assert spectral_ds.plugin_of(optimizer) is None


class Composite(torch.optim.Optimizer):
    def __init__(self, matrices, others):
        self.matrices, self.others = SGD(matrices), SGD(others)
        self.param_groups = self.matrices.param_groups + self.others.param_groups

    def step(self, closure=None):
        self.matrices.step()
        self.others.step()


class Custom:
    def __init__(self, parameters, lr):
        self.param_groups = [{"params": list(parameters), "lr": lr}]

    def step(self):
        pass


def test_what_has_no_hooks_and_wraps_nothing_known_is_refused_by_name():
    model = make_model()
    with pytest.raises(spectral_ds.UnsupportedEngineError, match=r"one of \.matrices, \.others"):
        spectral_ds.attach(model, Composite(model[0].parameters(), model[2].parameters()), SECTION)
    with pytest.raises(spectral_ds.UnsupportedEngineError, match=r"Custom .*pass the torch optim"):
        attached(Custom)
    with pytest.raises(spectral_ds.UnsupportedEngineError, match="got a list of 4"):
        spectral_ds.attach(model, [SGD([p]) for p in model.parameters()], SECTION)


class Idle(SGD):
    """Holds an optimizer of the same parameters, and steps without it."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.kept = SGD(self.param_groups[0]["params"], lr=lr)


def test_a_wrapper_that_steps_by_itself_is_told(caplog):
    model, optimizer, _ = attached(Idle)
    for _ in range(2):
        backward(model)
        optimizer.step()
    (warning,) = warnings_of(caplog)
    assert "not filtered: a step of Idle" in warning
    assert "attached to SGD" in warning


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
