"""Which graph `spectral-ds inspect` recommends, and what it says, draws and writes of all."""

import json
import sys

import numpy as np
import pytest
import torch
import yaml
from commands import inspect, linear_model, run, write_model
from matplotlib import image

import spectral_ds
from spectral_ds.cli.inspect import candidates, inspection
from spectral_ds.cli.inspect.inspection import Inspection
from spectral_ds.config import GraphConfig
from spectral_ds.spectrum import SignalToNoise

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
    return write_model(tmp_path_factory.mktemp("cli"))


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
        "activity", "degrees", "density", "eigenvalues", "roughness", "snr",
    }  # fmt: skip
    for path in out.glob("*.png"):
        pixels = image.imread(path)
        assert min(pixels.shape[:2]) > 200
        assert len(np.unique(pixels[::5, ::5].reshape(-1, pixels.shape[-1]), axis=0)) > 20


def test_a_log_file_gets_lines_and_tables_name_roles_candidates_and_the_section(
    folder, capsys, monkeypatch
):
    monkeypatch.setattr(sys.modules["spectral_ds.console.progress"], "SECONDS_BETWEEN_LINES", 0.0)
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


def test_a_graph_of_its_own_is_a_candidate_too():
    config = spectral_ds.load_config(
        {"graph": {"edges": [{"family": "ring"}, {"family": "depth"}]}}
    )
    found = {each.name: each.graph for each in candidates.candidates(config.stack)}
    assert found.keys() == {*USUAL, "configured"}
    assert found["configured"] == config.graph


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
