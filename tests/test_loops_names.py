"""What names and modules mean: blocks, embeddings and heads, matrices that lie otherwise."""

import logging
from dataclasses import replace

import numpy as np
import oracle
import pytest
import tiny
import torch
import transformers
from test_plan import moved_by_brute_force, needed_by_brute_force, same_flow
from torch import nn

import spectral_ds
from spectral_ds import planning
from spectral_ds.config import SpectralConfigError, load_config
from spectral_ds.geometry.buckets import Bucket
from spectral_ds.graph import Depth, ParameterNodes, Ring, Similarity, Storage, parameter_nodes
from spectral_ds.monitor import ParameterNorms
from spectral_ds.planning.groups import plan_groups
from spectral_ds.planning.parts import joined
from spectral_ds.sharding import Communicator, Fragment
from spectral_ds.stack import choose_graphs, facts_of

ALONE = Communicator.alone(torch.device("cpu"))
EDGES = [{"family": "similarity", "neighbours": 2}]
FILTER = {"response": "heat", "tau": 2.0, "strength": 0.8, "tolerance": 1e-7}
QUIET = {"monitor": {"enabled": False}}
RATE = 64.0  # large, so that weights before minus after hold the gradient precisely


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
    norms = ParameterNorms(shapes, [Fragment(n, 0, 0) for n in shapes], ALONE)
    assert set(norms.roles) == {each.role for each in nodes.values()}
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


def one_step(model, section, loss=None):
    """(weights before, gradients, weights before minus after, plugin), by name; float64."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    before = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
    plugin = spectral_ds.attach(model, optimizer, section)
    if loss is None:  # any gradient will do
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    else:
        loss(model).backward()
    gradients = {n: p.grad.double().numpy().copy() for n, p in model.named_parameters()}
    optimizer.step()
    after = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    return before, gradients, {n: (before[n] - after[n]) / RATE for n in before}, plugin


def assert_close(found, expected):
    for name, right in expected.items():
        assert np.abs(found[name] - right).max() <= 1e-5 * np.abs(right).max(), name


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


def on_paper(kind, **settings):
    """(shapes, facts) of a model of transformers; no weight is made."""
    with torch.device("meta"):
        model = kind(kind.config_class(**settings))
    named = dict(model.named_parameters())
    return {n: tuple(p.shape) for n, p in named.items()}, facts_of([model], named)


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


# A graph that joins nothing


class Vectors(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(7))

    def forward(self):
        return self.a.square().sum() + self.b.square().sum()


EDGELESS = {
    "similarity": "compares rows of a matrix, and none has two",
    "ring": "joins rows of a matrix, and none has two",
    "depth": "in several blocks, and there are none",
    "pair": "which it knows by their names, and there are none",
}


def warnings_of(caplog):
    return [r.message for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("family", EDGELESS)
def test_a_graph_without_edges_is_a_warning_that_says_why_once(caplog, family):
    section = {"graph": {"edges": [{"family": family}], "refresh_interval": 1}, **QUIET}
    model = Vectors()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    spectral_ds.attach(model, optimizer, section)
    for _ in range(3):  # it is built again at each
        model().backward()
        optimizer.step()
    [warning] = [text for text in warnings_of(caplog) if "edges reach" in text]
    assert warning.startswith("spectral_ds.graph: 0 edges reach 0 of the 12 elements")
    assert EDGELESS[family] in warning


def test_a_graph_with_hardly_an_edge_is_a_warning_of_its_own_graph(caplog):
    model = nn.ModuleDict({"wide": nn.Linear(2000, 1), "small": nn.Linear(1, 2)})
    graphs = [{"edges": [{"family": "ring"}], "node": node} for node in ("row", "column")]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    spectral_ds.attach(model, optimizer, {"graphs": graphs, **QUIET})
    [warning] = [text for text in warnings_of(caplog) if "edges reach" in text]
    assert warning.startswith("spectral_ds.graphs[0]: 1 edges reach 2 of the 2,005 elements")
    assert "few have two" in warning


@pytest.mark.parametrize(
    "section",
    [
        {"preset": "grokfast"},  # no graph acts
        {"filter": {"response": "identity"}},
        # Without a gradient there is no edge yet.
        {"graph": {"edges": [{"family": "similarity", "features": "gradient"}],
                   "refresh_interval": 2}},
    ],
)  # fmt: skip
def test_there_is_no_such_warning_where_no_edge_is_missed(caplog, section):
    model = Vectors()
    spectral_ds.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), {**section, **QUIET})
    assert not [text for text in warnings_of(caplog) if "edges reach" in text]


def test_similarity_of_weights_that_are_zero_is_told(caplog):
    model = nn.Linear(4, 6, bias=False)
    nn.init.zeros_(model.weight)
    spectral_ds.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), QUIET)
    [warning] = [text for text in warnings_of(caplog) if "edges reach" in text]
    assert "weights may be zero" in warning


# Matrices that lie otherwise


def usual(arrays, storage):
    """By (name, number): each matrix of (outputs, inputs)."""
    found = {}
    for name, array in arrays.items():
        stored = storage.get(name, Storage())
        matrices = array if stored.is_stacked else [array]
        for number, matrix in enumerate(matrices):
            found[f"{name}|{number}"] = matrix.T if stored.is_input_first else matrix
    return found


def expected_of(before, gradients, storage, edges, node="row"):
    """The oracle on each matrix as a parameter of its own; one σ² for a stack."""
    arrays, signals = usual(before, storage), usual(gradients, storage)
    laplacian = oracle.laplacian_of(adjacency_by_stack(arrays, edges, node))
    filtered = oracle.apply_function(laplacian, oracle.response_of(FILTER), signals, node)
    found = {}
    for name, array in before.items():
        stored = storage.get(name, Storage())
        count = len(array) if stored.is_stacked else 1
        matrices = [filtered[f"{name}|{number}"] for number in range(count)]
        matrices = [matrix.T if stored.is_input_first else matrix for matrix in matrices]
        found[name] = np.stack(matrices) if stored.is_stacked else matrices[0]
    return found


def adjacency_by_stack(arrays, edges, node):
    """W of the oracle; of similarity, whose σ² is that of all matrices of a parameter, its own."""
    total = 0
    first, count = oracle.numbering(arrays, node)
    for edge in edges:
        if edge["family"] != "similarity":
            total = total + oracle.adjacency_of(arrays, [edge], kind=node)
            continue
        matrix = np.zeros((count, count))
        for parameter in dict.fromkeys(name.partition("|")[0] for name in arrays):
            pairs = []
            for name in arrays:
                if name.partition("|")[0] != parameter:
                    continue
                rows = oracle.as_nodes(arrays[name], node)
                norm = np.linalg.norm(rows, axis=1)
                for i in range(len(rows)):
                    others = [j for j in range(len(rows)) if j != i and norm[i] * norm[j] > 0]
                    cosine = {j: rows[i] @ rows[j] / (norm[i] * norm[j]) for j in others}
                    others.sort(key=lambda j, cosine=cosine: -cosine[j])
                    start = first[name]
                    pairs += [
                        (start + i, start + j, 2 - 2 * cosine[j])
                        for j in others[: edge["neighbours"]]
                    ]
            variance = np.mean([d for _, _, d in pairs]) if pairs else 1.0
            for i, j, d in pairs:
                matrix[i, j] = matrix[j, i] = np.exp(-d / (2 * variance))
        total = total + matrix
    return total


def tiny_gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=13, n_positions=8,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def tiny_experts(kind):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 13, "hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4,
        "num_experts_per_tok": 1, "head_dim": 4,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return model


def language_loss(model):
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    return model(input_ids=tokens, labels=tokens).loss


MAKE = {
    "GPT-2": tiny_gpt2,
    "Mixtral": lambda: tiny_experts("Mixtral"),
    "GPT-OSS": lambda: tiny_experts("GptOss"),
}
GRAPHS = {
    "similar rows": ("row", EDGES),
    "similar columns": ("column", EDGES),
    "ring of rows": ("row", [{"family": "ring"}]),
}


@pytest.mark.parametrize("model", MAKE)
@pytest.mark.parametrize("graph", GRAPHS)
def test_rows_are_outputs_of_each_matrix_wherever_they_lie(model, graph):
    node, edges = GRAPHS[graph]
    made = MAKE[model]()
    facts = facts_of([made], dict(made.named_parameters()))
    graph = {"node": node, "edges": edges}
    section = {"graph": graph, "filter": FILTER, **QUIET}
    before, gradients, moved, plugin = one_step(made, section)
    names = {parameter.name for parameter in plugin.graph.parameters}
    before = {n: v for n, v in before.items() if n in names}
    gradients = {n: v for n, v in gradients.items() if n in names}
    assert_close(moved, expected_of(before, gradients, facts.storage, edges, node))
    assert facts.storage


@pytest.mark.parametrize("model", ["Mixtral", "GPT-OSS"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_an_expert_that_got_no_token_does_not_move(model, graph):
    node, edges = GRAPHS[graph]
    section = {"graph": {"node": node, "edges": edges}, "filter": FILTER, **QUIET}
    made = MAKE[model]()
    _, gradients, moved, _ = one_step(made, section, language_loss)
    idle = busy = 0
    for name in gradients:
        if "experts" in name:
            for gradient, change in zip(gradients[name], moved[name], strict=True):
                idle += not gradient.any()
                busy += bool(change.any())
                assert change.any() == gradient.any(), name
    assert idle > 0
    assert busy > 0


def test_only_modules_of_experts_are_stacks():
    model = nn.ModuleDict({"conv": nn.Conv1d(3, 4, 2), "experts": nn.Conv1d(3, 4, 2)})
    model["own"] = nn.Bilinear(2, 3, 4)
    assert not facts_of([model], dict(model.named_parameters())).storage
    shapes, facts = on_paper(transformers.GPT2LMHeadModel, n_layer=1)
    assert {n for n, s in facts.storage.items() if s == Storage(is_input_first=True)} == {
        name for name in shapes if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    }


def sharded(model, engine):
    """What a step of one engine changes, by name; every rank has the same batch."""
    import deepspeed

    made = MAKE[model]()
    section = {"graph": {"edges": EDGES}, "filter": FILTER, **QUIET}
    before = {name: p.detach().double().numpy().copy() for name, p in made.named_parameters()}
    optimizer = torch.optim.SGD(made.parameters(), lr=RATE)
    if engine == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(made)
        optimizer = torch.optim.SGD(made.parameters(), lr=RATE)
        plugin = spectral_ds.attach(made, optimizer, section)
        language_loss(made).backward()
        optimizer.step()
        plugin.detach()
    else:
        config = tiny.deepspeed_config(int(engine[-1]), spectral_ds=section)
        trained = spectral_ds.initialize(model=made, optimizer=optimizer, config=config)[0]
        trained.backward(language_loss(trained))
        trained.step()
    after = {}
    for name, parameter in made.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            whole = parameter.detach()
            whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
            after[name] = whole.double().numpy().copy()
    return {name: (before[name] - after[name]) / RATE for name in before}


def test_rows_that_lie_otherwise_are_filtered_alike_on_shards(ranks):
    pool = ranks(2)
    for model in ("GPT-2", "GPT-OSS"):
        section = {"graph": {"edges": EDGES}, "filter": FILTER, **QUIET}
        _, _, alone, _ = one_step(MAKE[model](), section, language_loss)
        largest = max(np.abs(change).max() for change in alone.values())
        for engine in ("zero2", "zero3", "fsdp2"):
            moved = pool.run(sharded, model, engine)[0]
            assert moved.keys() == alone.keys()
            for name, change in alone.items():
                assert np.abs(moved[name] - change).max() <= 1e-5 * largest, (engine, name)


# The plan knows where nodes lie


STORED = {
    "usual": {},
    "input first": {"b": Storage(is_input_first=True)},
    "stacked": {name: Storage(is_stacked=True) for name in "abc"},
    "some stacked and input first": {
        "a": Storage(is_stacked=True, is_input_first=True),
        "c": Storage(is_stacked=True),
    },
}


def stored_nodes(storage, node):
    """Parameters of several blocks; some have nodes of equal width, as rows and as columns."""
    kinds = {"a": (4, 6, 5), "b": (6, 5), "c": (4, 6), "d": (5, 6)}
    shapes = {f"layers.{b}.{kind}": shape for b in range(2) for kind, shape in kinds.items()}
    stored = {name: storage[name[-1]] for name in shapes if name[-1] in storage}
    return shapes, list(parameter_nodes(shapes, node, stored).values())


@pytest.mark.parametrize("engine", ["zero1", "zero3", "fsdp2"])
@pytest.mark.parametrize("stored", STORED)
def test_every_rank_sends_and_receives_what_is_planned(engine, stored):
    world_size = 5
    cluster = planning.Cluster(world_size, 1)
    for node in ("row", "column", "element"):
        shapes, parameters = stored_nodes(STORED[stored], node)
        cuts = planning.cut_parameters(engine, shapes, world_size)
        layout = planning.shard_layout(cuts, world_size)
        for families in ([Depth()], [Ring()], [Depth(), Ring()]):
            groups = plan_groups(parameters, families, cuts, cluster)
            for group in groups:
                members = group.parameters
                if group.is_path:
                    members = [replace(each, kind="parameter") for each in members]
                bucket = Bucket.of(members)
                needed = needed_by_brute_force(bucket, families, layout)
                same_flow(group.boundary.hop, needed, cluster)
                same_flow(group.transpose, moved_by_brute_force(bucket, layout), cluster)
                touched = cluster.by_rank(group.parts.rank, group.parts.touched)
                assert touched.tolist() == bucket.touched(layout).tolist()
            edges = sum(group.edges[0] for group in groups)
            assert edges == counted(groups, families)
            by_width = {group.parts.width: [] for group in groups}
            for group in groups:
                by_width[group.parts.width].append(group)
            for alike in by_width.values():  # what is packed together
                both = joined([group.parts for group in alike])
                columns = both.columns(cluster)
                members = [p for group in alike for p in group.parameters]
                if alike[0].is_path:
                    members = [replace(each, kind="parameter") for each in members]
                for rank, own in enumerate(layout.fragments):
                    held = np.zeros(both.width, bool)
                    for part in Bucket.of(members).rectangles(own):
                        held[part.column : part.column + part.columns] = True
                    assert columns[rank] == held.sum()


def counted(groups, families):
    """Undirected edges, one by one."""
    found = 0
    for group in groups:
        first = np.cumsum([0, *(p.nodes for p in group.parameters)])
        nodes = np.arange(first[-1])
        one_way = [family.edges(group.parameters, first, nodes) for family in families]
        pairs = {
            (i, *sorted(pair))
            for i, edges in enumerate(one_way)
            for pair in zip(edges.source.tolist(), edges.target.tolist(), strict=True)
        }
        found += len(pairs)
    return found


@pytest.mark.parametrize("node", ["row", "column"])
def test_similar_nodes_are_planned_within_each_matrix(node):
    shapes = {"a": (8, 30, 20)}
    storage = {"a": Storage(is_stacked=True, is_input_first=True)}
    parameters = list(parameter_nodes(shapes, node, storage).values())
    cluster = planning.Cluster(4, 1)
    cuts = planning.cut_parameters("zero3", shapes, 4)
    [group] = plan_groups(parameters, [Similarity(neighbours=3)], cuts, cluster)
    nodes = {"row": 20, "column": 30}[node]
    assert group.edges[1:] == (8 * nodes * 3 / 2, 8 * nodes * 3)
    assert group.boundary.hop.total == 0  # each rank owns two whole matrices
    assert group.links.tolist() == [group.all_links / 4] * 4


# What the user is told


def test_inspect_says_which_dimension_is_the_output(tmp_path, capsys):
    from spectral_ds.cli import main

    tiny_gpt2().save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--eigenvalues", "1"]) == 0
    [line] = [text for text in capsys.readouterr().out.splitlines() if "stored as" in text]
    assert line.startswith("stored as (inputs, outputs); a row is one output: ")
    assert "transformer.h.*.attn.c_attn.weight" in line
    assert ParameterNodes("e", (4, 3, 2), storage=Storage(True, True)).dimensions == (
        "(experts, inputs, outputs)"
    )
    assert ParameterNodes("e", (4, 3), storage=Storage(True)).dimensions == "(experts, outputs)"
