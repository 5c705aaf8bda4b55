"""Optimizers of two half-steps, and those that wrap others: filtered once, refused or told.

What is refused at the end of attaching leaves nothing behind.
"""

import pytest
import torch
from ring_steps import (
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
    step_of,
    warnings_of,
)

import spectral_ds
from spectral_ds.engines.torch_engine import TorchEngine
from spectral_ds.stack import stack

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


def test_two_half_steps_that_are_both_filtered_by_hand_are_measured_once():
    section = {**SECTION, "monitor": {"interval": 1}, "statistics": {"interval": 1}}
    model, optimizer, plugin = attached(SharpnessAware, section)
    for number in range(2):
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        for half in (optimizer.first_step, optimizer.second_step):
            loss_of(model).backward()
            plugin.filter_gradients()
            half(zero_grad=True)
        after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        assert plugin.engine.step == plugin.snr().samples == number + 1
    loss_of(model).backward()
    plugin.filter_gradients()  # tells what the last step has changed
    ratio = float((after - before).norm() / before.norm())
    assert plugin.metrics()["update_to_weight/all"] == pytest.approx(ratio, rel=1e-4)


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


# Refused at the end of attaching.


class OwnRate(torch.optim.SGD):
    """Finds its own learning rate, as some do."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        self.param_groups[0]["lr"] = None


@pytest.fixture
def engine_that_fails(monkeypatch):
    def fail(self, function):
        raise RuntimeError("it ends here")

    monkeypatch.setattr(TorchEngine, "when_complete", fail)


def hooks_of(model, optimizer):
    found = [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]
    return found + [hook for module in model.modules() for hook in module._forward_pre_hooks]


LEARNING = {"family": "activations", "keep": "given", "learn": "training"}


def test_an_error_at_the_end_of_attaching_leaves_no_hook(engine_that_fails):
    model = make_model()
    optimizer = SGD(model.parameters(), lr=1.0)
    graph = {"node": "column", "edges": [LEARNING]}
    with pytest.raises(RuntimeError, match="it ends here"):
        spectral_ds.attach(model, optimizer, {**UPDATE, "graph": graph})
    assert hooks_of(model, optimizer) == []


def test_a_second_graph_that_is_refused_leaves_no_hook_of_the_first(monkeypatch):
    def refuse(*_):
        raise spectral_ds.SpectralConfigError("not this one")

    monkeypatch.setattr(stack, "StackedGraph", refuse)
    model = make_model()
    optimizer = SGD(model.parameters(), lr=1.0)
    graphs = [{"node": "column", "edges": [LEARNING]}, SECTION["graph"]]
    section = {name: value for name, value in UPDATE.items() if name != "graph"}
    with pytest.raises(spectral_ds.SpectralConfigError, match="not this one"):
        spectral_ds.attach(model, optimizer, {**section, "graphs": graphs})
    assert hooks_of(model, optimizer) == []


def test_what_is_refused_has_left_no_hook():
    section = {**SECTION, "regularizer": {"strength": 0.1, "coupling": "decoupled"}}
    model = make_model()
    optimizer = OwnRate(model.parameters(), lr=1.0)
    with pytest.raises(spectral_ds.UnsupportedEngineError, match="lr is None"):
        spectral_ds.attach(model, optimizer, section)
    assert hooks_of(model, optimizer) == []
    optimizer.param_groups[0]["lr"] = 1.0
    plugin = spectral_ds.attach(model, optimizer, SECTION)
    assert_filtered_once(model, plugin, lambda: (backward(model), optimizer.step()))


def test_a_monitor_without_a_folder_has_left_no_hook(tmp_path):
    (tmp_path / "file").touch()
    section = {
        **UPDATE,
        "graph": {"node": "column", "edges": [LEARNING]},
        "monitor": {"folder": str(tmp_path / "file" / "runs")},
    }
    model = make_model()
    optimizer = SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        with pytest.raises(spectral_ds.SpectralConfigError, match=r"monitor\.folder"):
            spectral_ds.attach(model, optimizer, section)
        assert hooks_of(model, optimizer) == []
