"""Runs with graphs of activations in one process: what joins later, what is gone on with, and
scripts that do not know of them."""

import copy
import logging

import numpy as np
import pytest
import tiny
import torch
import transformers
from activation_runs import LEARNS, Run
from activations import (
    RATE,
    CalledByIds,
    expected_update,
    inputs_of,
    keeping,
    operator_of,
    random_ids,
    section_of,
)
from changing import watching
from expected import relative_error
from transformers.models.llama.modeling_llama import LlamaMLP

import spectral_ds

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
    assert "trained from step 1 on" in said(logging.INFO)[-1]
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


@pytest.mark.parametrize("width", [37, 24])
def test_a_layer_in_the_place_of_one_of_the_same_names_has_graphs_of_its_own(width):
    section = section_of({"rank": 8})
    run = Run(section)
    run.step(random_ids(4))
    layer, kept = run.model.llama.model.layers[1], run.plugin.graph.keep
    old = list(layer.mlp.parameters())
    torch.manual_seed(1)
    layer.mlp = LlamaMLP(tiny.llama_config(intermediate_size=width))
    [group] = run.optimizer.param_groups
    group["params"] = [p for p in group["params"] if all(p is not each for each in old)]
    run.optimizer.add_param_group({"params": list(layer.mlp.parameters())})
    fresh = copy.deepcopy(run.model)
    run.step(random_ids(4))
    wanted = spectral_ds.attach(fresh, torch.optim.SGD(fresh.parameters(), lr=RATE), section)
    for kind in ("gate", "up", "down"):
        name = f"llama.model.layers.1.mlp.{kind}_proj.weight"
        np.testing.assert_array_equal(
            run.plugin.graph.operator(name), wanted.graph.operator(name), err_msg=name
        )
    name = "llama.model.layers.1.self_attn.o_proj.weight"
    assert run.plugin.graph.keep.of(name) is kept.of(name)
    run.plugin.detach()
    wanted.detach()


def test_where_all_is_replaced_training_is_learned_from_again():
    model, x = torch.nn.Sequential(torch.nn.Linear(6, 5)), torch.randn(200, 6)
    plugin, optimizer = keeping(model, [x], section_of({**LEARNS, "keep": "given"}))
    for width in (4, 3):
        model(x).square().sum().backward()
        optimizer.step()
        assert plugin.graph.learn.of("0.weight")
        model[0] = torch.nn.Linear(6, width)
        optimizer.param_groups[0]["params"] = list(model.parameters())
        model(x[:10]).square().sum().backward()
        optimizer.step()
        assert plugin.graph.learn is None
        assert not plugin.graph.keep.of("0.weight")
        plugin.calibrate([x])
    plugin.detach()


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
