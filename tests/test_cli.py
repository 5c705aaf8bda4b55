"""The command line: inspect against dense numpy, env against importlib, and each wrong input."""

import contextlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import gguf
import numpy as np
import oracle
import pytest
import tiny
import torch
import yaml
from matplotlib import image
from scipy.sparse.csgraph import connected_components
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import spectral_ds
from spectral_ds.cli import env, main
from spectral_ds.cli.errors import DataError, UserError
from spectral_ds.cli.inspect import candidates, group_spectrum, inspection, model_under_test
from spectral_ds.cli.inspect.batches import token_batches
from spectral_ds.cli.inspect.graph_properties import InspectedGraph
from spectral_ds.cli.inspect.inspection import Inspection
from spectral_ds.cli.inspect.model_under_test import ModelUnderTest
from spectral_ds.cli.text import read_texts
from spectral_ds.config import EdgeConfig, GraphConfig
from spectral_ds.laplacian import kernels
from spectral_ds.spectrum import SignalToNoise

WORDS = ["a", "fine", "film", "with", "no", "plot", "but", "the", "best", "cast", "this", "year"]
HEADS, KEY_HEADS = 4, 2
USUAL = {
    "weights similarity, rows",
    "gradient similarity, rows",
    "gradient similarity, columns",
    "depth",
    "pair",
    "ring",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with its tokenizer, and a text."""
    path = tmp_path_factory.mktemp("cli")
    vocabulary = {word: i for i, word in enumerate(["<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(
        path / "model"
    )
    torch.manual_seed(0)
    settings = tiny.llama_config(
        vocab_size=len(vocabulary),
        max_position_embeddings=64,
        eos_token_id=0,
        bos_token_id=0,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
    )
    LlamaForCausalLM(settings).save_pretrained(path / "model")
    likely = [2.0**-i for i in range(len(WORDS))]
    generator = torch.Generator().manual_seed(0)
    texts = torch.multinomial(torch.tensor([likely] * 160), 12, True, generator=generator)
    lines = [f"{i}\t" + " ".join(WORDS[j] for j in text) for i, text in enumerate(texts)]
    (path / "reviews.tsv").write_text("\n".join(lines) + "\n")
    return path


def run(*words):
    """Exit status and output of a command that prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main([str(word) for word in words])
    return status, out.getvalue()


def inspect(folder, section, *words):
    """The summary of the tiny model under a configuration."""
    config = folder / "config.yaml"
    config.write_text(json.dumps(section))
    status, out = run("inspect", folder / "model", "--config", config, "--json", *words)
    assert status == 0
    return json.loads(out)


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


def distinct(values):
    kept = []
    for value in values:
        if not kept or value - kept[-1] > 1e-6:
            kept.append(value)
    return kept


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
    degree = adjacency.sum(axis=1)[here]
    return {
        "nodes": int(here.sum()),
        "edges": int(joined[here].sum() + joined[:, here].sum() - joined[np.ix_(here, here)].sum())
        // 2,
        "components": len(np.unique(label[here])),
        "isolated": int((degree == 0).sum()),
        "degree": pytest.approx(distribution(degree)),
        "neighbours": pytest.approx(distribution(joined.sum(axis=1)[here])),
        "lambda_max_bound": pytest.approx(oracle.bound_of(adjacency, laplacian)),
        "lambda_max": pytest.approx(values[-1], abs=1e-9),
        "lowest_eigenvalues": pytest.approx(distinct(values[values > 1e-8])[:8], abs=1e-7),
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
        wanted = expected(weights, chosen, chosen_edges, node, laplacian)
        assert {key: properties[key] for key in wanted} == wanted
        assert sum(properties["density"]) == pytest.approx(1)
        assert sum(properties["degree_histogram"]) == properties["nodes"]


def test_density_counts_the_eigenvalues(folder):
    [graph] = inspect(folder, {"graph": {"edges": [SIMILAR]}})["graphs"]
    laplacian = oracle.laplacian_of(oracle.adjacency_of(filtered_weights(folder), [SIMILAR]))
    values = np.linalg.eigvalsh(laplacian).round(9)
    counts = np.histogram(values.clip(0), np.linspace(0, 2, inspection.BINS + 1))[0]
    assert graph["whole"]["density"] == pytest.approx(counts / counts.sum())


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
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda: False)
    assert main(["inspect", str(model)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"spectral-ds: {model}: cannot be loaded: ")
    assert "install" in line
    assert "gguf" in line


def linear_model(rows, columns):
    torch.manual_seed(0)
    return ModelUnderTest(torch.nn.Linear(columns, rows, bias=False), seed=0)


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


@pytest.fixture(scope="module")
def judged(folder):
    """A run with data, what it printed and its folder."""
    words = ["--data", folder / "reviews.tsv", "--steps", 16, "--batch-size", 4]
    words += ["--sequence-length", 16, "--out", folder / "out"]
    return inspect(folder, {}, *words), folder / "out"


def test_all_candidates_are_judged_with_finite_figures(judged):
    summary, _ = judged
    found = summary["candidates"]
    assert {each["name"] for each in found} == USUAL
    ratios = [each["kept_over_total"] for each in found]
    assert all(np.isfinite(ratio) and ratio > 0 for ratio in ratios)
    assert ratios == sorted(ratios, reverse=True)
    for each in found:
        assert each["samples"] == 8
        assert each["edges"] > 0
        assert np.isfinite([*each["signal"], *each["noise"]]).all()
        assert 0 <= each["signal_kept"] <= 1
        assert 0 <= each["noise_kept"] <= 1
        assert max(each["alignment"].values()) <= 1
        assert "signal" in each["words"]


def test_summary_and_figures_are_written(judged):
    summary, out = judged
    assert json.loads((out / "summary.json").read_text()) == summary
    assert {path.stem for path in out.glob("*.png")} == {
        "degrees", "density", "eigenvalues", "roughness", "snr",
    }  # fmt: skip
    for path in out.glob("*.png"):
        pixels = image.imread(path)
        assert min(pixels.shape[:2]) > 200
        assert len(np.unique(pixels[::5, ::5].reshape(-1, pixels.shape[-1]), axis=0)) > 20


def test_a_log_file_gets_lines_and_no_bars(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["spectral_ds.console.progress"], "SECONDS_BETWEEN_LINES", 0.0)
    words = ["--data", folder / "reviews.tsv", "--steps", 4, "--batch-size", 1]
    inspect(folder, {}, *words, "--sequence-length", 8)
    written = capsys.readouterr().err
    assert "\r" not in written
    for what in (
        "building the parameter graph: ",
        "spectrum: ",
        "gradients that make graphs: 2 of 2 steps",
        "gradients that judge graphs: 2 of 2 steps",
    ):
        assert f"spectral_ds: {what}" in written


def test_the_recommended_section_can_be_pasted(judged):
    recommendation = judged[0]["recommendation"]
    assert yaml.safe_load(recommendation["yaml"]) == recommendation["config"]
    spectral_ds.load_config(recommendation["config"])


@pytest.mark.parametrize("response", ["heat 2", "wiener"])
@pytest.mark.parametrize("name", sorted(USUAL))
def test_every_section_means_its_graph_and_response(name, response):
    graph = {c.name: c.graph for c in candidates.candidates((GraphConfig(exclude=("*norm*",)),))}
    config = spectral_ds.load_config({"spectral_ds": candidates.section(graph[name], response)})
    assert config.graph == graph[name]
    assert config.filter.response == response.split()[0]
    assert config.filter.strength == 1
    if response == "heat 2":
        assert config.filter.tau == 2


def test_a_graph_of_its_own_is_a_candidate_too(folder):
    section = {"graph": {"edges": [{"family": "ring"}, {"family": "depth"}]}}
    words = ["--data", folder / "reviews.tsv", "--steps", 4, "--batch-size", 1]
    found = inspect(folder, section, *words, "--sequence-length", 8)["candidates"]
    assert {each["name"] for each in found} == {*USUAL, "configured"}


def test_graphs_that_follow_gradients_are_inspected_with_data(folder):
    section = {"preset": "denoise", "filter": {"response": "heat"}}
    section["graphs"] = [
        {"edges": [{"family": "similarity", "features": "gradient"}], "refresh_interval": 5},
        {"edges": [{"family": "ring"}], "node": "column"},
    ]
    words = ["--data", folder / "reviews.tsv", "--steps", 4, "--batch-size", 1]
    summary = inspect(folder, section, *words, "--sequence-length", 8)
    assert [graph["name"] for graph in summary["graphs"]] == ["graphs[0]", "graphs[1]"]
    assert all(graph["whole"]["edges"] > 0 for graph in summary["graphs"])
    assert {each["name"] for each in summary["candidates"]} == {*USUAL, "configured, graphs[1]"}


def test_a_graph_of_too_many_nodes_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr(model_under_test, "MAX_NODES", 90)
    config = spectral_ds.load_config({"graph": {"node": "element", "edges": [{"family": "ring"}]}})
    with pytest.raises(UserError, match=r"spectral_ds.graph: 100 nodes are more than the 90"):
        Inspection(linear_model(10, 10), config, eigenvalues=1)


def judge(monkeypatch, signal, noise, steps, seeds=(1, 2)):
    """Results by name on the weights of one matrix, whose gradient is signal plus noise.

    The seeds are of the noise of both halves of the gradients.
    """
    model = linear_model(*signal.shape)
    halves = iter(seeds)

    def gradients(model, batches):
        generator = torch.Generator().manual_seed(next(halves))
        for _ in batches:
            sample = signal + noise * torch.randn(signal.shape, generator=generator)
            yield [sample.reshape(-1)]

    monkeypatch.setattr(inspection, "gradients_of", gradients)
    found = Inspection(model, spectral_ds.load_config({}), eigenvalues=4)
    found.take_means(torch.zeros(steps, 1, 1))
    results = found.candidate_results()
    graphs = {candidate.name: candidate.graph for candidate in found.candidates}
    return {each.name: each for each in results}, candidates.recommend(results, graphs)


def test_planted_clusters_of_gradients_are_found(monkeypatch):
    centers = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    signal = (centers - centers.mean(dim=0)).repeat(32, 1)
    results, recommendation = judge(monkeypatch, signal, 3.0, steps=24)
    best = results["gradient similarity, rows"]
    assert best.kept_over_total > 3
    assert best.signal_kept > 0.5
    assert sum(best.signal) == pytest.approx(float(signal.square().sum()), rel=0.3)
    assert sum(best.noise) == pytest.approx(9 * signal.numel(), rel=0.3)
    assert results["weights similarity, rows"].signal_kept < 0.05
    assert results["depth"].words == "joins nothing on this model"
    assert "use gradient similarity, rows" in recommendation.words
    [edge] = spectral_ds.load_config(recommendation.config).graph.edges
    assert edge.features == "gradient"


@pytest.mark.parametrize(("size", "steps"), [((400, 32), 8), ((64, 32), 32)])
def test_no_graph_is_recommended_for_noise(monkeypatch, size, steps):
    for seed in range(12):
        seeds = 2 * seed + 1, 2 * seed + 2
        results, recommendation = judge(monkeypatch, torch.zeros(size), 1.0, steps, seeds)
        assert recommendation.config == {"spectral_ds": {"preset": "observe"}}, (seed, results)


def test_noise_is_signal_only_to_the_graph_that_was_made_from_it(monkeypatch):
    def signal_to_noise(seeds):
        results, _ = judge(monkeypatch, torch.zeros(400, 32), 1.0, 24, seeds)
        found = results["gradient similarity, rows"]
        return sum(found.signal[:4]) / sum(found.noise[:4])

    assert abs(signal_to_noise((1, 2))) < 0.02
    assert signal_to_noise((1, 1)) > 0.05


def test_alignment_is_the_cosine_with_the_true_gradient():
    size = 20_000
    centers = (np.arange(4) + 0.5) / 4
    signal, noise = np.array([8.0, 2.0, 1.0, 0.5]), np.array([1.0, 1.0, 2.0, 4.0])
    generator = np.random.default_rng(0)
    true = np.sqrt(signal / size)[:, None] * generator.standard_normal((4, size))
    seen = true + np.sqrt(noise / size)[:, None] * generator.standard_normal((4, size))
    found = candidates.alignments(SignalToNoise(centers, signal, noise, 9), lambda_max=2.0)
    for name, gains in {
        "identity": np.ones(4),
        "heat 2": np.exp(-2 * 2 * centers),
        "wiener": signal / (signal + noise),
    }.items():
        filtered = gains[:, None] * seen
        cosine = (filtered * true).sum() / np.linalg.norm(filtered) / np.linalg.norm(true)
        assert found[name] == pytest.approx(cosine, abs=0.01)
    assert max(found, key=found.get) == "wiener"


def test_the_tables_name_roles_candidates_and_the_section(folder):
    status, out = run(
        "inspect", folder / "model", "--data", folder / "reviews.tsv",
        "--steps", 4, "--batch-size", 1, "--sequence-length", 8,
    )  # fmt: skip
    assert status == 0
    for words in (
        "model.layers.*.self_attn.q_proj.weight",
        "ring",
        "Recommendation",
        "spectral_ds:",
    ):
        assert words in out


ROWS = ["a fine film", "no plot", "the best cast"]


@pytest.mark.parametrize(
    "kind", ["headless.tsv", "header.tsv", "objects.jsonl", "lines.txt", "passages.txt", "dataset"]
)
def test_each_format_gives_the_texts(tmp_path, kind):
    path = tmp_path / kind
    if kind == "headless.tsv":
        path.write_text("".join(f"{i}\t{text}\n" for i, text in enumerate(ROWS)))
    elif kind == "header.tsv":
        path.write_text("text\tid\n" + "".join(f"{text}\t7\n" for text in ROWS))
    elif kind == "objects.jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ROWS))
    elif kind == "dataset":
        datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(str(path))
    else:
        path.write_text(("\n" if kind == "lines.txt" else "\n\n").join(ROWS))
    assert read_texts(path) == ROWS


def test_another_text_column_is_read_or_missed(tmp_path):
    (tmp_path / "a.tsv").write_text("id\treview\tby\n1\tfine\tme\n")
    assert read_texts(tmp_path / "a.tsv", "review") == ["fine"]
    with pytest.raises(DataError, match="no column 'words', only id, review, by"):
        read_texts(tmp_path / "a.tsv", "words")


def test_no_two_batches_share_text(tmp_path):
    class Letters:
        eos_token_id = 0

        def __call__(self, texts, **options):
            return {"input_ids": [[int(text)] for text in texts]}

    (tmp_path / "a.txt").write_text("\n".join(str(i) for i in range(1, 601)))
    place = {"batches": 6, "batch_size": 5, "sequence_length": 40, "seed": 3}
    texts = read_texts(tmp_path / "a.txt")
    tokens = token_batches(texts, Letters(), **place)
    assert tokens.shape == (6, 5, 40)
    numbers = tokens[tokens > 0].tolist()
    assert len(numbers) == len(set(numbers)) == 600
    with pytest.raises(DataError, match=r"1,200 tokens.*need 1,400"):
        token_batches(texts, Letters(), **{**place, "batches": 7})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "{f}/gone"], "gone: no such file or folder"),
        (["inspect", "./gone.gguf"], "gone.gguf: no such file or folder"),
        (["inspect", "{f}/reviews.tsv"], "neither a model's folder nor a .gguf file"),
        (["inspect", "{f}"], "cannot be loaded"),
        (["inspect", "{f}/model", "--config", "{f}/gone.yaml"], "gone.yaml: cannot be read"),
        (["inspect", "{f}/model", "--config", "{f}/misspelt.yaml"], "spectral_ds.filter.strength"),
        (["inspect", "{f}/model", "--config", "{f}/nothing.yaml"], "'*absent*' matches no"),
        (["inspect", "{f}/model", "--config", "{f}/gradient.yaml"], "give --data"),
        (["inspect", "{f}/model", "--data", "{f}/gone.tsv"], "gone.tsv: no such file"),
        (["inspect", "{f}/model", "--data", "{f}/empty.tsv"], "empty.tsv: holds no text"),
        (["inspect", "{f}/model", "--data", "{f}/cut.jsonl"], "line 2 is not JSON"),
        (["inspect", "{f}/model", "--data", "{f}/model"], "not a folder that datasets"),
        (["inspect", "{f}/model", "--data", "{f}/reviews.tsv"], "need 16,384"),
        (
            ["inspect", "{f}/model", "--data", "{f}/reviews.tsv", "--sequence-length", "65"],
            "the model's longest is 64",
        ),
        (["inspect", "{f}/remote"], "trust_remote_code"),
        (["inspect", "{f}/model", "--out", "{f}/reviews.tsv"], "is not a folder"),
        (["inspect", "{f}/model", "--steps", "3"], "'3' is not a whole number from 4 on"),
        (["inspect"], "MODEL"),
        (["inspekt"], "inspekt"),
        ([], "COMMAND"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(folder, capsys, words, message):
    (folder / "remote").mkdir(exist_ok=True)
    (folder / "remote" / "own.py").write_text("raise SystemExit('not to be run')")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "remote" / "config.json").write_text(json.dumps(own))
    (folder / "misspelt.yaml").write_text("filter: {strenght: 1.0}")
    (folder / "nothing.yaml").write_text("graph: {include: ['*absent*']}")
    (folder / "gradient.yaml").write_text("preset: denoise")
    (folder / "empty.tsv").write_text("\n\n")
    (folder / "cut.jsonl").write_text('{"text": "a"}\n{"text"\n')
    extra = [] if "--sequence-length" in words else ["--sequence-length", "64"]
    extra = [*extra, "--batch-size", "8"] if "--data" in words else []
    capsys.readouterr()
    assert main([word.format(f=folder) for word in words] + extra) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("spectral-ds")
    assert message in line


@pytest.mark.usefixtures("processes")
def test_an_unknown_model_is_one_line_in_the_shell():
    done = subprocess.run(
        [Path(sys.executable).parent / "spectral-ds", "inspect", "nobody/nothing"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "nobody/nothing: cannot be loaded (HF_HUB_OFFLINE is set)" in line


def test_the_version_is_the_package_s():
    assert run("--version") == (0, f"spectral-ds {spectral_ds.__version__}\n")


@pytest.mark.parametrize("words", [["--help"], ["inspect", "--help"], ["env", "--help"]])
def test_help_gives_examples(words):
    status, out = run(*words)
    assert status == 0
    assert "examples:\n  spectral-ds" in out


def test_env_agrees_with_the_installation():
    status, out = run("env", "--json")
    found = json.loads(out)
    assert status == 0
    assert found.keys() == {
        "versions", "kernels", "engines", "devices", "communication", "missing",
    }  # fmt: skip
    assert found["versions"].pop("python") == sys.version.split()[0]
    for name, version in found["versions"].items():
        assert version == importlib.metadata.version(name)
    assert {"torch", "deepspeed", "transformers", "torch-sparse"} <= found["versions"].keys()
    assert found["kernels"].keys() == {"torch_csr", "torch_sparse", "dense"}
    assert found["kernels"]["torch_csr"]["works"]
    assert all(found["engines"][name]["works"] for name in ("deepspeed", "fsdp2", "ddp"))
    assert found["communication"]["gloo"] is True
    status, table = run("env")
    assert status == 0
    assert importlib.metadata.version("torch") in table


def test_env_says_what_is_broken_and_how_to_get_it(monkeypatch):
    def broken(*arguments):
        raise OSError("undefined symbol")

    monkeypatch.setitem(kernels.KERNELS, "torch_sparse", broken)
    found = env.environment()
    assert found["kernels"]["torch_sparse"] == {"works": False, "detail": "undefined symbol"}
    [missing] = [each for each in found["missing"] if each["what"] == "torch-sparse"]
    assert "pip install --no-build-isolation torch-scatter torch-sparse" in missing["command"]
    assert run("env")[0] == 0  # others work
    for name in list(kernels.KERNELS):
        monkeypatch.setitem(kernels.KERNELS, name, broken)
    assert run("env")[0] == 1


def test_env_names_a_version_that_is_too_old(monkeypatch):
    monkeypatch.setattr(env.importlib.metadata, "requires", lambda name: ["torch>=99.1", "rich>=1"])
    [missing] = env.environment()["missing"]
    assert missing["what"] == "torch"
    assert "too old" in missing["why"]
    assert missing["command"].endswith("-m pip install 'torch>=99.1'")
