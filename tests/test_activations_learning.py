"""What is learned from training, in one process: what is seen, when it is enough, what stays."""

import copy
import logging
import pickle

import numpy as np
import pytest
import tiny
import torch
from activation_runs import LEARNS, Run, learned_from
from activations import (
    RATE,
    CalledByIds,
    expected_update,
    operator_of,
    random_ids,
    section_of,
)
from expected import relative_error

import spectral_ds


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_what_is_learned_is_seen_in_training_and_the_filter_idles_until_then(
    closure, micro_batches, said
):
    """20 sequences are enough; a step sees 12. With a closure, it is known a step later."""
    section = section_of(LEARNS, filter={"tau": 0.5})
    run = Run(section)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0  # so that all is seen with the same weights
    batches = [random_ids(12, seed=10 + number) for number in range(3)]
    run.step(*batches[0].chunk(micro_batches), closure=closure)
    assert run.hooks() > 0
    assert run.plugin.graph.learn is None
    for group in run.optimizer.param_groups:
        group["lr"] = RATE
    plain, moved = run.step(*batches[1].chunk(micro_batches), closure=closure)
    seen = learned_from(run, batches[:2])
    if closure:
        assert relative_error(moved, plain["gradients"]) <= 1e-6
        for parameter, value in run.begin.items():
            dict(run.model.named_parameters())[parameter].data.copy_(torch.from_numpy(value))
        plain, moved = run.step(*batches[2].chunk(micro_batches), closure=closure)
    assert run.hooks() == 0
    assert relative_error(moved, expected_update(section, plain, learned=seen)) <= 1e-5
    assert "what is learned is known" in said(logging.INFO)[-1]
    run.plugin.detach()


def test_evaluation_is_not_learned_from_and_detaching_takes_the_hooks_back():
    run = Run(section_of(LEARNS))
    for _ in range(2):
        run.model.eval()
        run.model(random_ids(40))
        run.model.train()
        run.step(random_ids(5))
    assert run.plugin.graph.learn is None
    assert run.hooks() > 0
    run.plugin.detach()
    assert run.hooks() == 0


def learned_in_two_steps(run):
    """Operators of what 20 sequences, which are waited for, show; by matrix."""
    run.step(random_ids(19))
    assert run.plugin.graph.learn is None
    run.step(random_ids(1))
    learn = run.plugin.graph.learn
    found = {key: learn.of(key[0])[0].matrix() for key in run.plugin.graph.held.graph_of}
    run.plugin.detach()
    return found


def test_a_model_that_is_trained_in_evaluation_is_learned_from():
    """As `from_pretrained` gives it; calls without gradients are no training."""
    found = []
    for is_training in (True, False):
        run = Run(section_of(LEARNS), CalledByIds().train(is_training))
        with torch.no_grad():
            run.model.eval()(random_ids(40, seed=1))
        run.model.train(is_training)
        found.append(learned_in_two_steps(run))
    for key, operator in found[0].items():
        np.testing.assert_array_equal(found[1][key], operator)


def test_a_training_that_shows_no_inputs_is_told_so_at_its_begin_and_end(said):
    run = Run(section_of(LEARNS))
    with torch.no_grad():
        run.model.eval()(random_ids(40))
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.optimizer.step()
    assert "no input of a layer was seen in the first step" in said()[-1]
    assert "model.train()" in said()[-1]
    run.plugin.detach()
    assert "has not acted, as 0 tokens were seen of the 180" in said()[-1]


@pytest.mark.parametrize("by", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_is_not_learned_from(by):
    run = Run(section_of(LEARNS))
    copied = by(run.model)
    run.step(random_ids(5))
    copied(random_ids(40))  # in training; enough, if it counted
    run.step(random_ids(5))
    assert run.plugin.graph.learn is None
    run.plugin.detach()
    copied(random_ids(4))
    assert run.hooks() == 0


def test_a_training_that_ends_before_enough_is_seen_is_told_so(said):
    """20 sequences of 9 tokens are waited for; a step sees 5."""
    run = Run(section_of(LEARNS))
    run.step(random_ids(5))
    run.step(random_ids(5))
    assert "filtered from about step 3 on, when 180 tokens are seen" in said(logging.INFO)[-1]
    run.plugin.detach()
    assert "has not acted, as 90 tokens were seen of the 180" in said(logging.INFO)[-1]


def test_checkpointed_activations_are_learned_from_alike():
    """They are computed twice, and count once."""
    found = []
    for checkpoints in (False, True):
        model = CalledByIds()
        if checkpoints:
            model.llama.gradient_checkpointing_enable()
        run = Run(section_of(LEARNS), model.train())
        found.append(learned_in_two_steps(run))
    for key, operator in found[0].items():
        np.testing.assert_allclose(found[1][key], operator, atol=1e-5 * operator.max())


@pytest.mark.parametrize("is_called", [False, True])
def test_a_compiled_model_is_learned_from(is_called):
    layers = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh()), torch.nn.Linear(5, 4)
    model = torch.nn.Sequential(*layers)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(200, 6)
    if is_called:
        compiled(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    section = section_of({**LEARNS, "keep": "given"})
    plugin = spectral_ds.attach(compiled, optimizer, section)
    inner = layers[0](x).detach()
    compiled(x).sum().backward()
    optimizer.step()
    for name, inputs in {"0.0.weight": x, "1.weight": inner}.items():
        wanted = operator_of(inputs.double().numpy(), 8)
        got = plugin.graph.learn.of(name)[0].matrix()
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    plugin.detach()


def test_experts_are_learned_from_while_they_are_trained():
    """All at once, as transformers computes them: not while they are watched."""
    model = tiny.experts("Mixtral").train()
    model.set_experts_implementation("grouped_mm")
    ids = random_ids(20, 9, vocabulary=13)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = spectral_ds.attach(model, optimizer, section_of({"rank": 8, "keep": "given"}))
    given.calibrate([{"input_ids": ids}])
    wanted = {key: given.graph.operator(*key) for key in given.graph.held.graph_of}
    given.detach()
    plugin = spectral_ds.attach(model, optimizer, section_of({**LEARNS, "keep": "given"}))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for (name, matrix), operator in wanted.items():
        got = plugin.graph.learn.of(name)[matrix].matrix()
        np.testing.assert_allclose(got, operator, atol=1e-5 * operator.max())
    assert any("experts" in name for name, _ in wanted)
    assert model.get_experts_implementation() == {"": "grouped_mm"}
    plugin.detach()


class Two(torch.nn.Module):
    """Two layers, of other inputs each, of which one may be left out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(6, 4, bias=False)
        self.second = torch.nn.Linear(6, 4, bias=False)

    def forward(self, x, both=True):
        found = self.first(x).square().sum()
        return found + self.second(x.roll(1, -1)).square().sum() if both else found


def test_what_nothing_entered_while_it_was_learned_counts_as_learned_like_anything():
    model, generator = Two(), torch.Generator().manual_seed(1)
    kept, x = (torch.randn(30, 6, generator=generator) for _ in range(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    plugin = spectral_ds.attach(
        model, optimizer, section_of({**LEARNS, "keep": "given", "length": 1})
    )
    plugin.calibrate([kept])
    model(x, both=False).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert plugin.graph.learn is not None
    before = model.second.weight.detach().clone()
    model(x).backward()
    optimizer.step()
    moved = (before - model.second.weight.detach()).double().numpy() / RATE
    gradient = model.second.weight.grad.double().numpy()
    damping = np.eye(6) + 1.5 * operator_of(kept.roll(1, -1).double().numpy(), 8)
    expected = 0.2 * gradient + 0.8 * gradient @ np.linalg.inv(damping)
    largest = np.abs(gradient).max()
    np.testing.assert_allclose(moved, expected, atol=1e-5 * largest, equal_nan=False)
    plugin.detach()


def test_at_a_rebuild_what_was_learned_is_used_until_it_is_known_anew():
    section = section_of(LEARNS, filter={"tau": 0.5})
    section["graph"]["refresh_interval"] = 2
    run = Run(section)
    run.step(random_ids(25))
    first, kept = run.plugin.graph.learn, run.plugin.graph.keep
    assert first is not None
    run.step(random_ids(5))
    run.step(random_ids(5))  # built anew, of the present weights
    assert run.plugin.graph.keep is not kept
    assert run.plugin.graph.learn is first
    run.step(random_ids(25))
    assert run.plugin.graph.learn is not first
    assert run.hooks() == 0
    run.plugin.detach()


def test_a_rebuild_keeps_what_was_given():
    section = section_of({"keep": "given", "rank": 8})
    section["graph"]["refresh_interval"] = 1
    run = Run(section)
    ids = random_ids(20)
    run.plugin.calibrate([ids])
    for _ in range(2):
        plain, moved = run.step(ids)
        assert relative_error(moved, expected_update(section, plain, kept=ids)) <= 1e-5
    run.plugin.detach()
