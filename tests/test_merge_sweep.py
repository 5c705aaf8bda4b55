"""`spectral-ds merge --sweep`: settings judged beside plain interpolation."""

import csv
import json
from itertools import product

import numpy as np
import pytest
import torch
from commands import run
from merged import (
    LENGTH,
    LOOK,
    WORDS,
    merge,
    write_models,
)
from safetensors.numpy import load_file
from transformers import (
    BertForSequenceClassification,
    LlamaForCausalLM,
)

from spectral_ds.cli.merge.sweep import INTERPOLATION, Setting, recommended, with_gains


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("merge"), ("llama", "bert"))


@pytest.fixture(scope="module")
def swept(folder, tmp_path_factory):
    """A sweep that is judged on texts to keep and to learn: its folder, and what it printed."""
    own, out = folder / "llama", tmp_path_factory.mktemp("swept")
    task, general = folder / "labelled.tsv", folder / "general.txt"
    status, said = run(
        "merge", own / "base", own / "tuned", "--out", out, "--keep", general, "--learn", task,
        *LOOK, "--sweep", "--task", task, "--general", general,
    )  # fmt: skip
    assert status == 0
    return out, said


def rows_of(path):
    with (path / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def language_loss(model, path, length):
    """Nats a token on every second text of a file, in float64."""
    total, count = 0.0, 0
    lines = [line.split("\t")[-1] for line in path.read_text().splitlines()]
    for text in lines[1::2]:
        ids = [2 + WORDS.index(word) for word in text.split()]
        for at in range(0, len(ids), length):
            piece = torch.tensor([ids[at : at + length]])
            with torch.no_grad():
                logs = model(input_ids=piece).logits.double().log_softmax(-1)[0]
            total -= float(logs[:-1].gather(1, piece[0, 1:, None]).sum())
            count += piece.shape[1] - 1
    return total / count


def test_a_sweep_shows_the_tuned_model_and_the_base_at_its_ends(folder, swept):
    own, (out, said) = folder / "llama", swept
    task, general = folder / "labelled.tsv", folder / "general.txt"
    assert "α = 1" in said
    assert "Recommendation:" in said
    assert (out / "frontier.png").stat().st_size > 0
    assert not list(out.glob("*.safetensors"))
    rows = rows_of(out)
    ends = {row["alpha"]: row for row in rows if row["method"] == INTERPOLATION}
    models = [LlamaForCausalLM.from_pretrained(own / name).eval() for name in ("base", "tuned")]
    for alpha, model in zip(("0.0", "1.0"), models, strict=True):
        assert float(ends[alpha]["task"]) == pytest.approx(
            language_loss(model, task, LENGTH), rel=1e-5
        )
        assert float(ends[alpha]["general"]) == pytest.approx(
            language_loss(model, general, LENGTH), rel=1e-5
        )
    assert float(ends["0.0"]["forgetting"]) == 0
    settings = product(("0.3", "1.0", "3.0"), ("0.6", "1.0"), ("0.8", "1.0"))
    assert {(r["mu"], r["rest"], r["scale"]) for r in rows if r["mu"]} == set(settings)


def test_texts_that_settings_are_judged_on_are_in_no_statistics(folder, swept, tmp_path):
    own, (out, _) = folder / "llama", swept
    halves = {"--keep": folder / "general.txt", "--learn": folder / "labelled.tsv"}
    words = []
    for option, path in halves.items():
        half = tmp_path / f"half{path.suffix}"
        half.write_text("".join(path.read_text().splitlines(keepends=True)[::2]))
        words += [option, half]
    merge(own, own / "tuned", *words, *LOOK, "--out", tmp_path / "of halves")
    for name in ("keep", "learn-1"):
        file = f"statistics/{name}.safetensors"
        found, expected = (load_file(path / file) for path in (out, tmp_path / "of halves"))
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[each], expected[each]) for each in expected)


def test_a_setting_of_the_sweep_is_the_model_that_merge_writes(folder, tmp_path):
    own = folder / "llama"
    task, general = folder / "labelled.tsv", folder / "general.txt"
    words = [own / "base", own / "tuned", *LOOK, "--keep", folder / "keep.txt"]
    words += ["--mu", "0.5", "--scale", "0.7"]
    judged = ["--sweep", "--task", task, "--general", general]
    assert run("merge", *words, *judged, "--out", tmp_path / "sweep")[0] == 0
    assert run("merge", *words, "--out", tmp_path / "out")[0] == 0
    setting = ("0.5", "0.6", "0.7")
    rows = rows_of(tmp_path / "sweep")
    [row] = [r for r in rows if (r["mu"], r["rest"], r["scale"]) == setting]
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert float(row["task"]) == pytest.approx(language_loss(model, task, LENGTH), rel=1e-5)


def test_a_sweep_of_classifiers_counts_labels_and_neighbours(folder, tmp_path):
    own = folder / "classifier"
    status, out = run(
        "merge", own / "base", own / "tuned", "--out", tmp_path, *LOOK, "--json", "--sweep",
        "--task", folder / "labelled.tsv", "--general", folder / "general.txt",
    )  # fmt: skip
    assert status == 0
    settings = json.loads(out)["settings"]
    base, tuned = settings[0], settings[5]
    assert (base["alpha"], tuned["alpha"]) == (0, 1)
    assert base["general"] == 1
    assert tuned["forgetting"] == pytest.approx(1 - tuned["general"])
    model = BertForSequenceClassification.from_pretrained(own / "tuned").eval()
    lines = [line.split("\t") for line in (folder / "labelled.tsv").read_text().splitlines()[1::2]]
    right, losses = 0, []
    for label, text in lines:
        ids = torch.tensor([[2 + WORDS.index(word) for word in text.split()][:LENGTH]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits.double().log_softmax(-1)[0]
        right += int(logs.argmax()) == int(label)
        losses.append(-float(logs[int(label)]))
    assert tuned["accuracy"] == pytest.approx(right / len(lines))
    assert tuned["task"] == pytest.approx(np.mean(losses), rel=1e-5)


def setting(task, forgetting, alpha=None):
    method = "filtered" if alpha is None else INTERPOLATION
    one = None if alpha is not None else 1.0
    return Setting(method, alpha, one, one, one, task, None, 0.0, forgetting)


def test_the_recommended_setting_forgets_no_more_than_interpolation():
    line = [setting(5.0, 0.0, 0.0), setting(4.0, 0.1, 0.5), setting(3.0, 0.4, 1.0)]
    tried = [setting(3.5, 0.2), setting(3.2, 0.36), setting(2.9, 0.5), setting(4.5, 0.01)]
    found = with_gains([*line, *tried])
    gains = [each.gain for each in found[3:]]
    # On the line at 3.5: 0.25; at 3.2: 0.34; below all, against 0.4; at 4.5: 0.05.
    assert gains == pytest.approx([0.05, -0.02, -0.1, 0.04])
    assert recommended(found) == found[3]
    assert recommended(found[:3]) is None
