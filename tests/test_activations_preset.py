"""Preset retain_lm as it is, from its section to the weights."""

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


def trained(name):
    """Weights after steps of which the last are filtered, whole."""
    edge = {"family": "activations", "keep": "generated", "learn": "training",
            "rank": 8, "samples": 16, "length": 8}  # fmt: skip
    section = {"preset": "retain_lm", "graph": {"node": "column", "edges": [edge]}}
    training = Training(name, section, torch.optim.AdamW, tiny.ADAM_RATES, model=Writer)
    plugin = training.plugin
    training.train(4)
    weights = training.snapshot()
    assert plugin.stack.graphs[0].is_ready
    training.close()
    return weights


@pytest.fixture(scope="module")
def one_process(ranks):
    return ranks(1).run(trained, "plain")[0]


@pytest.mark.parametrize(("name", "world_size"), [("zero2", 2), ("zero3", 3), ("fsdp2", 2)])
def test_every_engine_trains_by_the_preset_alike(ranks, one_process, name, world_size):
    """Embeddings, which other graphs leave out, are in it."""
    for weights in ranks(world_size).run(trained, name):
        for parameter, value in one_process.items():
            np.testing.assert_allclose(
                weights[parameter], value, atol=1e-4, err_msg=parameter, equal_nan=False
            )
