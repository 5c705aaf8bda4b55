"""What names and modules mean: blocks, embeddings and heads."""

import numpy as np
import oracle
import pytest
import torch
import transformers
from on_paper import on_paper
from plain_step import assert_close, one_step
from torch import nn

from spectral_ds.config import SpectralConfigError, load_config
from spectral_ds.graph import Depth, parameter_nodes
from spectral_ds.stack import choose_graphs, facts_of

FILTER = {"response": "heat", "tau": 2.0, "strength": 0.8, "tolerance": 1e-7}


# Blocks and roles


def numbered(path, *counts):
    """Names by all numbers of a path with a # for each."""
    names = [path]
    for count in counts:
        names = [n.replace("#", str(i), 1) for n in names for i in range(count)]
    return names


def layers(path, *counts, kinds="qkvo", shape=(4, 3)):
    return {f"{name}.{kind}.weight": shape for name in numbered(path, *counts) for kind in kinds}


# By name: shapes of a model; then for some parameters their role and block.
MODELS = {
    "layers": (
        layers("model.layers.#", 3) | {"norm.weight": (3,)},
        {"model.layers.2.q.weight": ("model.layers.*.q.weight", 2), "norm.weight": None},
    ),
    "a wrapper that numbers its parts": (
        layers("0.auto_model.encoder.layer.#", 3) | {"2.linear.weight": (4, 3)},
        {
            "0.auto_model.encoder.layer.1.q.weight": ("0.auto_model.encoder.layer.*.q.weight", 1),
            "2.linear.weight": None,
        },
    ),
    "parts of equal shape in a wrapper": (
        {"0.weight": (4, 4), "1.weight": (4, 4), "2.weight": (4, 3)},
        {"1.weight": ("*.weight", 1), "2.weight": ("*.weight", 2)},
    ),
    "several equal models in a list": (
        layers("#.layers.#", 2, 3) | {"0.norm.weight": (3,), "1.norm.weight": (3,)},
        {"1.layers.2.q.weight": ("1.layers.*.q.weight", 2), "1.norm.weight": None},
    ),
    "models of different width in a list": (
        layers("0.layers.#", 2) | layers("1.layers.#", 2, shape=(8, 5)),
        {"1.layers.1.q.weight": ("1.layers.*.q.weight", 1)},
    ),
    "stages of blocks": (
        layers("stages.0.blocks.#", 2)
        | layers("stages.1.blocks.#", 4, shape=(8, 6))
        | {"stages.0.down.weight": (4, 2), "stages.1.down.weight": (8, 2)},
        {
            "stages.0.blocks.1.q.weight": ("stages.0.blocks.*.q.weight", 1),
            "stages.1.blocks.3.q.weight": ("stages.1.blocks.*.q.weight", 3),
            "stages.1.down.weight": None,
        },
    ),
    "stages that have a shape in common": (
        layers("stages.0.blocks.#", 2)
        | layers("stages.1.blocks.#", 2, shape=(8, 6))
        | layers("stages.2.blocks.#", 2, shape=(9, 6))
        | {f"{name}.scale": () for name in numbered("stages.#.blocks.#", 3, 2)},
        {"stages.2.blocks.1.scale": ("stages.2.blocks.*.scale", 1)},
    ),
    "parts of a block": (
        {f"{name}.norm": (3,) for name in numbered("block.#.layer.#", 4, 2)}
        | layers("block.#.layer.0", 4, kinds="qk")
        | layers("block.#.layer.1", 4, kinds="wv", shape=(5, 3)),
        {
            "block.3.layer.1.norm": ("block.*.layer.1.norm", 3),
            "block.3.layer.1.w.weight": ("block.*.layer.1.w.weight", 3),
        },
    ),
    "a sequence in each block": (
        layers("blocks.#.#", 6, 2, kinds="w"),
        {"blocks.4.1.w.weight": ("blocks.*.1.w.weight", 4)},
    ),
    "experts": (
        layers("layers.#.mlp.experts.#", 2, 8, kinds="wv") | layers("layers.#", 2),
        {"layers.1.mlp.experts.7.w.weight": ("layers.*.mlp.experts.7.w.weight", 1)},
    ),
    "experts alone, more than layers": (
        layers("layers.#.mlp.experts.#", 2, 8, kinds="wv"),
        {"layers.1.mlp.experts.7.w.weight": ("layers.*.mlp.experts.7.w.weight", 1)},
    ),
    "experts of one layer": (
        layers("layers.0.mlp.experts.#", 4, kinds="wv"),
        {"layers.0.mlp.experts.3.w.weight": ("layers.*.mlp.experts.3.w.weight", 0)},
    ),
    "one layer of others in a list of blocks": (
        layers("layers.#", 3) | {"layers.0.mlp.weight": (9, 9)},
        {"layers.0.mlp.weight": ("layers.*.mlp.weight", 0)},
    ),
    "one block": (
        layers("model.layers.0", kinds="qk"),
        {"model.layers.0.q.weight": ("model.layers.*.q.weight", 0)},
    ),
    "a digit that is no number": (
        {"²": (3,), "a.².weight": (4, 3), "a.③.weight": (4, 3), "a.1.weight": (4, 3)},
        {"²": None, "a.².weight": None, "a.1.weight": ("a.*.weight", 1)},
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_the_number_that_varies_among_equal_shapes_counts_blocks(model):
    shapes, expected = MODELS[model]
    nodes = parameter_nodes(shapes)
    for name, place in expected.items():
        found = nodes[name].role, nodes[name].block
        assert found == (place or (name, None)), name
    backwards = dict(reversed(list(shapes.items())))
    assert parameter_nodes(backwards) == nodes


def test_depth_joins_no_parameters_of_two_models_and_all_blocks_of_each():
    shapes, _ = MODELS["several equal models in a list"]
    names = list(shapes)
    links = Depth().links(list(parameter_nodes(shapes).values()))
    joined = sorted((names[a], names[b]) for a, b in links)
    kinds = "kqov"
    expected = [
        (f"{model}.layers.{block}.{kind}.weight", f"{model}.layers.{block + 1}.{kind}.weight")
        for model in (0, 1)
        for block in (0, 1)
        for kind in kinds
    ]
    assert joined == sorted(expected)


class Numbered(nn.Module):
    """Blocks inside a wrapper that numbers its parts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        blocks = nn.ModuleList(nn.ModuleDict({"²": nn.Linear(5, 5)}) for _ in range(3))
        self.parts = nn.ModuleList([nn.ModuleDict({"layer": blocks}), nn.Linear(5, 2)])

    def forward(self, x):
        for block in self.parts[0]["layer"]:
            x = x + block["²"](x).tanh()
        return self.parts[1](x)


def test_blocks_inside_a_wrapper_are_smoothed_over_depth():
    section = {"graph": {"edges": [{"family": "depth"}]}, "filter": FILTER}
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    found = one_step(Numbered(), section, lambda model: model(x).square().sum())
    _, gradients, moved, plugin = found
    # By hand: one path of three blocks; elements are filtered independently.
    path = np.diag([1.0, 1.0], 1) + np.diag([1.0, 1.0], -1)
    values, vectors = np.linalg.eigh(oracle.laplacian_of(path))
    matrix = (vectors * oracle.response_of(FILTER)(values)) @ vectors.T
    for kind in ("weight", "bias"):
        names = [f"parts.0.layer.{block}.².{kind}" for block in range(3)]
        signal = np.stack([gradients[name].ravel() for name in names])
        for name, right in zip(names, matrix @ signal, strict=True):
            assert_close({name: moved[name].ravel()}, {name: right})
    assert_close(moved, {n: gradients[n] for n in ("parts.1.weight", "parts.1.bias")})
    assert f"gradient_norm_by_block/{2:03d}" in plugin.metrics()
    assert "gradient_norm_by_role/parts.0.layer.*.².weight" in plugin.metrics()


# Embeddings and heads


def covered(shapes, facts, **graph):
    [choice] = choose_graphs(shapes, load_config({"graph": graph}), facts)
    return {parameter.name for parameter in choice.parameters}


T5 = {"num_layers": 2, "num_decoder_layers": 2}
LEFT_OUT = {
    "GPT2LMHeadModel": ({"n_layer": 2}, {"transformer.wte.weight", "transformer.wpe.weight"}),
    "GPT2ForSequenceClassification": (
        {"n_layer": 2},
        {"transformer.wte.weight", "transformer.wpe.weight", "score.weight"},
    ),
    "T5ForConditionalGeneration": (
        T5,
        {"shared.weight"}
        | {
            f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            for part in ("encoder", "decoder")
        },
    ),
    "T5ForSequenceClassification": (
        T5,
        {"transformer.shared.weight"}
        | {
            f"transformer.{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            for part in ("encoder", "decoder")
        }
        | {
            f"classification_head.{layer}.{kind}"
            for layer in ("dense", "out_proj")
            for kind in ("weight", "bias")
        },
    ),
    "BertForQuestionAnswering": (
        {"num_hidden_layers": 1},
        {"qa_outputs.weight", "qa_outputs.bias"}
        | {f"bert.embeddings.LayerNorm.{kind}" for kind in ("weight", "bias")}
        | {
            f"bert.embeddings.{kind}_embeddings.weight"
            for kind in ("word", "position", "token_type")
        },
    ),
    "LlamaForTokenClassification": (
        {"num_hidden_layers": 1},
        {"model.embed_tokens.weight", "score.weight", "score.bias"},
    ),
    "LlamaModel": ({"num_hidden_layers": 1}, {"embed_tokens.weight"}),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_embeddings_and_heads_are_left_out_whatever_their_names(kind):
    settings, left_out = LEFT_OUT[kind]
    shapes, facts = on_paper(getattr(transformers, kind), **settings)
    assert shapes.keys() - covered(shapes, facts) == left_out
    # All is taken in by who says so.
    assert covered(shapes, facts, exclude=[]) == shapes.keys()


def test_one_who_adds_to_the_default_patterns_keeps_what_they_mean():
    shapes, facts = on_paper(transformers.GPT2ForSequenceClassification, n_layer=1)
    default = covered(shapes, facts)
    patterns = ["*embed*", "*lm_head*", "*classifier*", "*pooler*", "*ln_*"]
    assert covered(shapes, facts, exclude=patterns) == {n for n in default if "ln_" not in n}
    # Other patterns take their place, as ever.
    written = covered(shapes, facts, exclude=["*ln_*"])
    assert written == {name for name in shapes if "ln_" not in name}
    # What is left out stays so, by pattern or by type, also if it is included by name.
    with pytest.raises(SpectralConfigError, match=r"embeddings and heads \(exclude: \[\] takes"):
        covered(shapes, facts, include=["*wte*", "score*"])


def test_a_wrapped_head_is_left_out_with_all_that_was_added_to_it():
    peft = pytest.importorskip("peft")
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11)
    model = transformers.GPT2ForSequenceClassification(config)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["c_attn", "wte"])
    model = peft.get_peft_model(model, lora)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(p.shape) for name, p in named.items()}
    found = covered(shapes, facts_of([model], named))
    assert found
    assert all("c_attn.lora" in name for name in found)
    assert any("score" in name for name in shapes)
