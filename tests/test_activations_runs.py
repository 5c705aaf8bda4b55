"""Runs with co-activation graphs in one process: what is learned from training, what joins later,
what is gone on with."""

import copy
import logging
import pickle

import numpy as np
import pytest
import tiny
import torch
import transformers
from activations import (
    RATE,
    CalledByIds,
    expected_update,
    inputs_of,
    operator_of,
    random_ids,
    section_of,
    trained,
)
from changing import watching
from expected import relative_error

import spectral_ds

LEARNS = {"rank": 8, "learn": "training", "samples": 20}


@pytest.fixture
def said(caplog):
    """What the package said so far, one string a message."""
    caplog.set_level(logging.INFO, "spectral_ds")
    return lambda level=logging.INFO: [r.getMessage() for r in caplog.records if r.levelno >= level]


class Run:
    """A model, steps of it by SGD, and what they are without a filter."""

    def __init__(self, section, model=None):
        self.model = CalledByIds() if model is None else model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)
        self.plugin = spectral_ds.attach(self.model, self.optimizer, section)
        self.begin = self.weights()

    def weights(self):
        return {n: p.detach().double().numpy().copy() for n, p in self.model.named_parameters()}

    def step(self, *micro_batches, closure=False):
        """(facts of the step without the plugin, what it changed)."""
        before = self.weights()

        def evaluate():
            self.optimizer.zero_grad()
            for ids in micro_batches:
                loss = self.model(ids) / len(micro_batches)
                loss.backward()
            gradients.update(
                (n, p.grad.double().numpy().copy())
                for n, p in self.model.named_parameters()
                if p.grad is not None
            )
            return loss

        gradients = {}
        if closure:
            self.optimizer.step(evaluate)
        else:
            evaluate()
            self.optimizer.step()
        after = self.weights()
        moved = {n: (before[n] - after[n]) / RATE for n in trained(self.model)}
        # The graph is of the weights at attach.
        plain = {"weights": self.begin, "rates": dict.fromkeys(moved, RATE)}
        return {**plain, "gradients": {n: gradients.get(n, 0 * moved[n]) for n in moved}}, moved

    def hooks(self):
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in self.model.modules())


def learned_from(run, batches):
    """By key, the ids of what is learned; they were seen with the weights of those steps."""
    return {number: np.asarray(ids) for number, ids in enumerate(batches)}


# Learning


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
    assert "what is learned is known" in said()[-1]
    run.plugin.detach()


def test_evaluation_is_not_learned_from_and_detaching_takes_the_hooks_back():
    run = Run(section_of(LEARNS))
    run.model.eval()
    run.model(random_ids(40))
    run.model.train()
    run.step(random_ids(5))
    assert run.plugin.graph.learn is None
    assert run.hooks() > 0
    run.plugin.detach()
    assert run.hooks() == 0


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
    assert "filtered from about step 3 on, when 180 tokens are seen" in said()[-1]
    run.plugin.detach()
    assert "has not acted, as 90 tokens were seen of the 180" in said()[-1]


def test_checkpointed_activations_are_learned_from_alike():
    """They are computed twice, and count once."""
    found = []
    for checkpoints in (False, True):
        model = CalledByIds()
        if checkpoints:
            model.llama.gradient_checkpointing_enable()
        run = Run(section_of(LEARNS), model.train())
        run.step(random_ids(19))
        assert run.plugin.graph.learn is None
        run.step(random_ids(1))
        learn = run.plugin.graph.learn
        found.append({key: learn.of(key[0])[0].matrix() for key in run.plugin.graph.held.graph_of})
        run.plugin.detach()
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


# Newcomers


def test_newcomers_have_graphs_of_their_own_and_those_that_are_known_stay(said):
    model = CalledByIds()
    late = {f"llama.model.layers.2.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in late)
    section = section_of({"rank": 8}, filter={"strength": 1.0})
    run = Run(section, model)
    run.step(random_ids(4))
    known = dict(run.plugin.graph.keep.spectra)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name in late)
    now = run.weights()
    plain, moved = run.step(random_ids(4))
    graph = run.plugin.graph
    for name, spectra in known.items():
        assert graph.keep.spectra[name] is spectra
    first = {n: u for n, u in expected_update(section, plain).items() if n not in late}
    later = expected_update(section, {**plain, "weights": now})
    expected = {**first, **{name: later[name] for name in late}}
    assert relative_error(moved, expected) <= 1e-5
    assert graph.keep.leaders["llama.model.layers.2.mlp.up_proj.weight"] in late
    assert "trained from step 1 on" in said()[-1]
    run.plugin.detach()


def test_newcomers_leave_no_hooks_behind():
    model = CalledByIds()
    name = "llama.model.layers.2.mlp.down_proj.weight"
    late = dict(model.named_parameters())[name]
    late.requires_grad_(False)
    run = Run(section_of(LEARNS), model)
    run.step(random_ids(4))
    late.requires_grad_(True)
    run.step(random_ids(4))
    assert run.plugin.graph.learn is None
    run.step(random_ids(25))
    assert run.plugin.graph.learn is not None
    assert run.plugin.graph.learn.of(name)
    assert run.hooks() == 0
    run.plugin.detach()


# State


def test_a_resumed_run_keeps_what_the_pretrained_model_knew(tmp_path):
    section = section_of(LEARNS)
    run = Run(section)
    run.step(random_ids(25))
    run.plugin.save(tmp_path)
    wanted = {key: run.plugin.graph.operator(*key) for key in run.plugin.graph.held.graph_of}
    learned = {n: run.plugin.graph.learn.of(n)[0].matrix() for n, _ in wanted}
    weights = run.weights()
    _, moved = run.step(random_ids(4))
    run.plugin.detach()

    model = CalledByIds()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.from_numpy(weights[name]))
    resumed = Run(section, model)
    name = "llama.model.layers.0.mlp.down_proj.weight"
    assert np.abs(resumed.plugin.graph.operator(name) - wanted[name, 0]).max() > 1e-2
    resumed.plugin.load(tmp_path)
    assert resumed.hooks() == 0
    for key, operator in wanted.items():
        np.testing.assert_array_equal(resumed.plugin.graph.operator(*key), operator)
        learn = resumed.plugin.graph.learn.of(key[0])[0]
        np.testing.assert_array_equal(learn.matrix(), learned[key[0]])
    _, again = resumed.step(random_ids(4))
    assert relative_error(again, moved) <= 1e-6
    resumed.plugin.detach()


def test_a_state_of_before_it_was_learned_is_learned_from_again(tmp_path):
    section = section_of(LEARNS)
    run = Run(section)
    run.step(random_ids(4))
    run.plugin.save(tmp_path)
    run.step(random_ids(25))
    assert run.plugin.graph.learn is not None
    run.plugin.load(tmp_path)
    assert run.plugin.graph.learn is None
    plain, moved = run.step(random_ids(4))
    assert relative_error(moved, plain["gradients"]) <= 1e-6
    run.step(random_ids(25))
    assert run.plugin.graph.learn is not None
    assert run.hooks() == 0
    run.plugin.detach()


def test_a_state_of_before_inputs_were_given_idles(tmp_path):
    section = section_of({"keep": "given"}, regularizer={"strength": 1.0, "coupling": "decoupled"})
    run = Run(section)
    run.plugin.save(tmp_path)
    run.plugin.calibrate([random_ids(20)])
    run.plugin.load(tmp_path)
    plain, moved = run.step(random_ids(4))
    assert relative_error(moved, plain["gradients"]) <= 1e-6
    run.plugin.detach()


# Without touching the script


def test_the_runner_attaches_a_graph_of_activations_to_an_unchanged_loop():
    section = section_of({"rank": 8})
    with watching(section) as said:
        model = CalledByIds()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        before = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
        model(random_ids(12)).backward()
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        gradients = {
            n: np.zeros(p.shape) if p.grad is None else p.grad.double().numpy().copy()
            for n, p in named.items()
        }
        optimizer.step()
    assert "not" not in said.getvalue()
    moved = {n: (before[n] - p.detach().double().numpy()) / RATE for n, p in named.items()}
    plain = {"weights": before, "gradients": gradients, "rates": dict.fromkeys(moved, RATE)}
    assert relative_error(moved, expected_update(section, plain)) <= 1e-5


def test_the_trainer_learns_from_its_own_batches(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # by which Accelerate would choose DDP
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(tiny.llama_config())
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-3, report_to="none", save_strategy="no", logging_steps=1, use_cpu=True,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in random_ids(24)]
    kept = operators_for_llama(model)
    callback = spectral_ds.SpectralCallback(section_of({**LEARNS, "samples": 12}))
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    seen = []
    is_known = []
    trainer.add_callback(Watching(lambda: is_known.append(callback.plugin.graph.is_ready)))
    trainer.add_callback(Watching(lambda: seen.append(callback.plugin.graph)))
    trainer.train()
    assert is_known == [False, True, True]  # eight sequences a step
    for name, operator in kept.items():
        got = seen[0].operator(name)
        np.testing.assert_allclose(got, operator, atol=1e-5 * operator.max())


class Watching(transformers.TrainerCallback):
    """Looks after each step."""

    def __init__(self, look):
        self.look = look

    def on_step_end(self, *_, **__):
        self.look()


def operators_for_llama(model):
    """R of twelve sequences of random ids, by weight."""
    ids = random_ids(12)
    found = inputs_of(copy.deepcopy(model).double(), lambda called: called(input_ids=ids))
    return {f"{n}.weight": operator_of(x, 8) for n, x in found.items() if n != "lm_head"}
