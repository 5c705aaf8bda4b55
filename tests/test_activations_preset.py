"""Presets retain_lm and anchor_lm as they are, from their sections to the weights."""

import copy

import numpy as np
import pytest
import tiny
import torch
import transformers
from activations import Writer
from cells import Training

import spectral_ds


def test_the_preset_of_language_models_filters_once_it_knows_what_is_learned():
    """From the preset alone: text that the model writes, and 256 x 64 tokens that it is given."""
    torch.manual_seed(0)
    models = [transformers.LlamaForCausalLM(tiny.llama_config(bos_token_id=1))]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-3) for model in models]
    plugin = spectral_ds.attach(models[1], optimizers[1], {"preset": "retain_lm"})
    weights = [model.model.layers[0].mlp.up_proj.weight for model in models]
    without_inputs = [
        [p for n, p in model.named_parameters() if "embed" in n or "norm" in n] for model in models
    ]
    same, shares = [], []
    for _ in range(2):  # of 128 x 64 tokens
        ids = torch.randint(3, 53, (128, 64))
        before = copy.deepcopy(without_inputs)
        for model, optimizer in zip(models, optimizers, strict=True):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        same.append(torch.equal(*weights))
        moved = [
            torch.cat([(p - b).detach().flatten() for p, b in zip(*pairs, strict=True)])
            for pairs in zip(without_inputs, before, strict=True)
        ]
        shares.append(float(moved[1] @ moved[0] / moved[0].square().sum()))
    plugin.detach()
    assert same == [True, False]
    assert shares == pytest.approx([1, 0.3], rel=1e-4)  # what has no inputs moves less


def test_the_anchor_pulls_back_along_what_the_model_writes():
    """Δ of two steps of SGD, from the preset alone: Δ ← (Δ + U)(I + ηαA)⁻¹ of an update U."""
    rate, strength, rest = 0.5, 10.0, 0.65
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(tiny.llama_config(bos_token_id=1))
    named = dict(model.named_parameters())
    before = {name: weight.detach().double().numpy().copy() for name, weight in named.items()}
    optimizer = torch.optim.SGD(model.parameters(), rate)
    plugin = spectral_ds.attach(model, optimizer, {"preset": "anchor_lm"})
    with_inputs = plugin.graph.keep.leaders
    expected = {name: np.zeros_like(weight) for name, weight in before.items()}
    for _ in range(2):
        ids = torch.randint(3, 53, (8, 64))
        model(input_ids=ids, labels=ids).loss.backward()
        for name, weight in named.items():
            update = -rate * weight.grad.double().numpy()
            if name in with_inputs:
                operator = np.asarray(plugin.graph.operator(name), np.float64)
                pull = np.eye(len(operator)) + rate * strength * operator
                expected[name] = (expected[name] + update) @ np.linalg.inv(pull)
            else:
                expected[name] = (expected[name] + rest * update) / (1 + rate * strength)
        optimizer.step()
        optimizer.zero_grad()
    assert plugin.describe().endswith("; decoupled regularizer of strength 10")
    plugin.detach()
    assert with_inputs.keys() < before.keys()
    for name, weight in named.items():
        moved = weight.detach().double().numpy() - before[name]
        np.testing.assert_allclose(moved, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def trained(name, preset):
    """Weights after steps of which the last are filtered, whole."""
    learned = {"learn": "training"} if preset == "retain_lm" else {}
    edge = {"family": "activations", "keep": "generated", **learned,
            "rank": 8, "samples": 16, "length": 8}  # fmt: skip
    section = {"preset": preset, "graph": {"node": "column", "edges": [edge]}}
    training = Training(name, section, torch.optim.AdamW, tiny.ADAM_RATES, model=Writer)
    plugin = training.plugin
    training.train(4)
    weights = training.snapshot()
    assert plugin.stack.graphs[0].is_ready
    training.close()
    return weights


PRESETS = ("retain_lm", "anchor_lm")


@pytest.fixture(scope="module")
def one_process(ranks):
    return {preset: ranks(1).run(trained, "plain", preset)[0] for preset in PRESETS}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("name", "world_size"), [("zero2", 2), ("zero3", 3), ("fsdp2", 2)])
def test_every_engine_trains_by_the_preset_alike(ranks, one_process, name, world_size, preset):
    """Embeddings, which other graphs leave out, are in it."""
    for weights in ranks(world_size).run(trained, name, preset):
        for parameter, value in one_process[preset].items():
            np.testing.assert_allclose(
                weights[parameter], value, atol=1e-4, err_msg=parameter, equal_nan=False
            )
