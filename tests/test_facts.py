"""What `spectral-ds inspect` finds of a graph: against dense numpy, and by hand."""

import importlib
import json

import gguf
import numpy as np
import oracle
import pytest
import tiny
from commands import HEADS, KEY_HEADS, distinct, inspect, linear_model, run, write_model
from scipy.sparse.csgraph import connected_components
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
)

import spectral_ds
from spectral_ds.cli import main
from spectral_ds.cli.errors import UserError
from spectral_ds.cli.inspect import group_spectrum, model_under_test
from spectral_ds.cli.inspect.graph_properties import DEGREE_BINS, InspectedGraph
from spectral_ds.cli.inspect.inspection import BINS, Inspection
from spectral_ds.config import EdgeConfig, GraphConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("cli"))


def filtered_weights(folder):
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    return {
        name: parameter.detach().numpy()
        for name, parameter in model.named_parameters()
        if tiny.is_filtered(name)
    }


def distribution(values):
    return {
        "min": min(values),
        "median": float(np.median(values)),
        "mean": sum(values) / len(values),
        "max": max(values),
    }


def expected(weights, chosen, edges, node, laplacian):
    """GraphProperties of some parameters' nodes by dense linear algebra over the whole graph."""
    head_width = 24 // HEADS
    adjacency = oracle.adjacency_of(weights, edges, kind=node, head_width=head_width)
    matrix = oracle.laplacian_of(adjacency, laplacian)
    first, total = oracle.numbering(weights, node)
    here = np.zeros(total, bool)
    variation = random = energy = 0.0
    for name in weights:
        rows = oracle.as_nodes(weights[name], node)
        at = first[name] + np.arange(len(rows))
        here[at] = name in chosen
        for other in weights if name in chosen else ():
            columns = oracle.as_nodes(weights[other], node)
            if columns.shape[1] == rows.shape[1]:
                block = matrix[np.ix_(at, first[other] + np.arange(len(columns)))]
                variation += np.sum(rows * (block @ columns))
        if name in chosen:
            energy += np.sum(rows**2)
            random += np.diag(matrix)[at] @ (rows**2).sum(axis=1)
    joined = adjacency > 0
    label = connected_components(adjacency)[1]
    # What edges may join: the parameters that some edge joins to one of the chosen, and so on.
    owner = np.repeat(
        np.arange(len(weights)), [len(oracle.as_nodes(w, node)) for w in weights.values()]
    )
    between = np.zeros((len(weights),) * 2)
    np.add.at(between, (owner[joined.nonzero()[0]], owner[joined.nonzero()[1]]), 1)
    group = connected_components(between)[1][owner]
    around = np.isin(group, group[here])
    values = np.linalg.eigvalsh(matrix[np.ix_(around, around)])
    bound, degrees = oracle.bound_of(adjacency, laplacian), adjacency.sum(axis=1)
    degree = degrees[here]
    density = np.histogram(values.round(9).clip(0), np.linspace(0, bound, BINS + 1))[0]
    histogram = np.histogram(degree, np.linspace(0, degrees.max(), DEGREE_BINS + 1))[0]
    return {
        "nodes": int(here.sum()),
        "edges": int(joined[here].sum() + joined[:, here].sum() - joined[np.ix_(here, here)].sum())
        // 2,
        "components": len(np.unique(label[here])),
        "isolated": int((degree == 0).sum()),
        "degree": pytest.approx(distribution(degree)),
        "neighbours": pytest.approx(distribution(joined.sum(axis=1)[here])),
        "lambda_max_bound": pytest.approx(bound),
        "lambda_max": pytest.approx(values[-1], abs=1e-9),
        "lowest_eigenvalues": pytest.approx(distinct(values[values > 1e-8])[:8], abs=1e-7),
        "density": pytest.approx(density / len(values)),
        "degree_histogram": histogram.tolist(),
        "roughness": pytest.approx(
            {
                "weights": variation / energy,
                "random": random / energy,
                "ratio": variation / random if random else None,
            }
        ),
    }


SIMILAR = {"family": "similarity", "neighbours": 4}


@pytest.mark.parametrize(
    ("edges", "node", "laplacian"),
    [
        ([SIMILAR], "row", "normalized"),
        ([SIMILAR], "column", "combinatorial"),
        ([{"family": "depth"}], "row", "combinatorial"),
        ([{"family": "pair"}, {"family": "depth", "weight": 0.5}], "row", "normalized"),
        ([{**SIMILAR, "scope": "role"}, {"family": "ring"}], "row", "normalized"),
    ],
)
def test_inspect_agrees_with_dense_linear_algebra(folder, edges, node, laplacian):
    section = {"graph": {"edges": edges, "node": node, "laplacian": laplacian}}
    summary = inspect(folder, section)
    weights = filtered_weights(folder)
    [graph] = summary["graphs"]
    parts = [(graph["whole"], set(weights), edges)]
    parts += [
        (properties, set(weights), [edge])
        for properties, edge in zip(graph["families"].values(), edges, strict=True)
    ]
    roles = {name: oracle.role_and_block(name)[0] for name in weights}
    assert set(graph["roles"]) == set(roles.values())
    parts += [
        (properties, {name for name in weights if roles[name] == role}, edges)
        for role, properties in graph["roles"].items()
    ]
    for properties, chosen, chosen_edges in parts:
        assert properties == expected(weights, chosen, chosen_edges, node, laplacian)


BLOCKS, WIDTH, INNER, WORDS_KNOWN = 3, 8, 12, 13


def encoder(path):
    """A tiny BERT with a classifier; its trainable parameters and their elements."""
    size = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
    settings = BertConfig(vocab_size=WORDS_KNOWN, intermediate_size=INNER, **size)
    model = BertForSequenceClassification(settings)
    model.save_pretrained(path)
    return path, [parameter.numel() for parameter in model.parameters()]


def gguf_file(path):
    """A tiny Llama in one file, as llama.cpp names its tensors; their sizes."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_block_count(BLOCKS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(WORDS_KNOWN)
    narrow = WIDTH * KEY_HEADS // HEADS
    block = dict.fromkeys(("attn_q", "attn_output"), (WIDTH, WIDTH))
    block |= dict.fromkeys(("attn_k", "attn_v"), (narrow, WIDTH))
    block |= dict.fromkeys(("ffn_gate", "ffn_up"), (INNER, WIDTH)) | {"ffn_down": (WIDTH, INNER)}
    block |= dict.fromkeys(("attn_norm", "ffn_norm"), (WIDTH,))
    shapes = {f"blk.{b}.{name}": shape for b in range(BLOCKS) for name, shape in block.items()}
    shapes |= dict.fromkeys(("token_embd", "output"), (WORDS_KNOWN, WIDTH))
    shapes["output_norm"] = (WIDTH,)
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = generator.standard_normal(shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, [int(np.prod(shape)) for shape in shapes.values()]


@pytest.mark.parametrize(
    ("make", "name", "rows", "vectors", "alone"),
    [
        # Rows of a block's matrices; its vectors, a node each; nodes that nothing joins.
        (encoder, "bert", [WIDTH] * 5 + [INNER], 10, 0),
        (gguf_file, "tiny.gguf", [WIDTH] * 3 + [INNER] * 2 + [WIDTH // 2] * 2, 2, 1),
    ],
)
def test_encoders_and_gguf_files_are_inspected(tmp_path, make, name, rows, vectors, alone):
    model, sizes = make(tmp_path / name)
    config = tmp_path / "config.yaml"
    config.write_text("graph: {edges: [{family: ring}, {family: depth}]}")
    status, _ = run("inspect", model, "--config", config, "--out", tmp_path / "out")
    assert status == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["parameters"], summary["elements"]) == (len(sizes), sum(sizes))
    [graph] = summary["graphs"]
    ring, depth = graph["families"].values()
    whole, in_block = graph["whole"], sum(rows) + vectors
    assert whole["nodes"] == BLOCKS * in_block + alone
    assert ring["edges"] == BLOCKS * sum(rows)
    assert depth["edges"] == (BLOCKS - 1) * in_block
    assert whole["edges"] == ring["edges"] + depth["edges"]
    # Rings joined over depth: one component a role.
    assert len(graph["roles"]) == whole["components"] == len(rows) + vectors + alone
    assert whole["isolated"] == alone
    assert depth["components"] == in_block + alone
    largest = max(properties["edges"] for properties in graph["roles"].values())
    assert largest == BLOCKS * INNER + (BLOCKS - 1) * INNER
    assert (whole["neighbours"]["min"], whole["neighbours"]["max"]) == (0 if alone else 1, 4)


def test_a_gguf_file_without_its_package_says_what_to_install(tmp_path, monkeypatch, capsys):
    model, _ = gguf_file(tmp_path / "tiny.gguf")
    reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    monkeypatch.setattr(reader, "is_gguf_available", lambda: False)
    assert main(["inspect", str(model)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"spectral-ds: {model}: cannot be loaded: ")
    assert "install" in line
    assert "gguf" in line


def inspection_of(model, edge, laplacian="normalized"):
    graph = GraphConfig(edges=(edge,), laplacian=laplacian)
    built = model.build(graph, model.nodes(graph), lambda done: None)
    found = InspectedGraph(
        built, model.weights(), model.layout.own,
        eigenvalues=4, bins=16, seed=0, progress=lambda done: None,
    )  # fmt: skip
    return found.whole(), built


def test_large_groups_are_measured_without_dense_matrices():
    properties, graph = inspection_of(linear_model(1500, 24), EdgeConfig(neighbours=6))
    assert graph.num_nodes > group_spectrum.DENSE_NODES
    values = np.linalg.eigvalsh(graph.laplacian().toarray())
    assert properties.lambda_max == pytest.approx(values[-1], rel=1e-5)
    above = distinct(values[properties.components :])
    assert properties.lowest_eigenvalues == pytest.approx(above[:4], rel=1e-5)
    counts = np.histogram(values, np.linspace(0, 2, 17))[0] / len(values)
    assert properties.density == pytest.approx(counts, abs=0.05)


def test_a_long_ring_has_its_known_eigenvalues():
    properties, _ = inspection_of(linear_model(1400, 2), EdgeConfig("ring"), "combinatorial")
    known = [2 - 2 * np.cos(2 * np.pi * k / 1400) for k in range(1, 5)]
    assert properties.lowest_eigenvalues == pytest.approx(known, rel=1e-6)
    assert properties.lambda_max == pytest.approx(4, rel=1e-5)
    assert (properties.components, properties.edges) == (1, 1400)


def test_a_graph_of_too_many_nodes_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr(model_under_test, "MAX_NODES", 90)
    config = spectral_ds.load_config({"graph": {"node": "element", "edges": [{"family": "ring"}]}})
    with pytest.raises(UserError, match=r"spectral_ds.graph: 100 nodes are more than the 90"):
        Inspection(linear_model(10, 10), config, eigenvalues=1)
