"""The commands of launch/ as a user runs them, on a tiny model."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import corpus
import pytest
from launching import forked
from quickstart_run import STEPS, run_quickstart
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.usefixtures("processes")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a corpus and configurations."""
    path = tmp_path_factory.mktemp("launch")
    corpus.write(path)
    config = json.loads((ROOT / "configs" / "zero2_spectral.json").read_text())
    (path / "spectral.json").write_text(json.dumps(config))
    misspelt = {**config, "spectral_ds": {"filter": {"strenght": 1.0}}}
    (path / "misspelt.json").write_text(json.dumps(misspelt))
    return path


def finetune(folder, *arguments, data="reviews.tsv", config="spectral.json"):
    """By forks: the quickstart takes the deepspeed launcher."""
    words = ["--model", folder / "model", "--data", folder / data]
    words += ["--deepspeed_config", folder / config, "--sequence-length", "16", *arguments]
    return forked(2, ROOT / "launch" / "finetune.py", *words, runner=False)


def summary(folder, name):
    return json.loads((folder / name / "summary.json").read_text())


@pytest.fixture(scope="module")
def quickstart(folder):
    """The folder of the quickstart's results on a tiny model, and what it printed."""
    printed = run_quickstart(folder)
    return folder / "runs", printed


COMMON_KEYS = {"final_loss", "losses", "perturbation", "step_seconds", "world_size", "zero_stage"}
SPECTRAL_KEYS = {"filter_seconds", "boundary_bytes", "nodes", "edges"}


def test_the_quickstart_shows_what_is_learned_and_kept_without_with_and_merged(quickstart):
    folder, stdout = quickstart
    without, retain = summary(folder, "without"), summary(folder, "retain")
    assert without.keys() >= COMMON_KEYS
    assert not without.keys() & SPECTRAL_KEYS
    assert retain.keys() >= COMMON_KEYS | SPECTRAL_KEYS
    for run in (without, retain):
        assert (run["world_size"], run["zero_stage"]) == (2, 2)
        assert len(run["losses"]) == STEPS
        assert run["perturbation"] > 0
    # The same weights and the same first batch, then different updates.
    assert without["losses"][0] == retain["losses"][0]
    assert without["losses"][-1] != retain["losses"][-1]
    models = json.loads((folder / "knowledge.json").read_text())["models"]
    assert list(models) == ["before", "without", "retain", "merged"]
    assert models["before"]["known"] == 1
    # The filter shrinks each change.
    assert models["without"]["known"] < models["merged"]["known"] < 1
    assert models["retain"]["step_seconds"] == retain["step_seconds"]
    assert (folder / "knowledge.png").stat().st_size > 5_000
    table = stdout[stdout.index("accuracy") :].splitlines()
    assert [line.split()[0] for line in table[2:6]] == list(models)

    [events] = (folder / "retain").rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    assert "spectral_ds/update_norm/after" in tags
    assert "Train/Samples/train_loss" in tags


def test_finetune_resumes(folder):
    done = finetune(folder, "--steps", 4, "--save-interval", 2, "--output", folder / "whole")
    assert done.code == 0, done.stderr
    shutil.copytree(folder / "whole" / "checkpoints", folder / "resumed" / "checkpoints")
    (folder / "resumed" / "checkpoints" / "latest").write_text("global_step2")
    done = finetune(folder, "--steps", 4, "--output", folder / "resumed", "--resume")
    assert done.code == 0, done.stderr
    whole, resumed = summary(folder, "whole"), summary(folder, "resumed")
    assert resumed["losses"] == pytest.approx(whole["losses"], abs=1e-6)
    # It has begun neither at the start nor at the end.
    ends = whole["evaluation_loss_before"], whole["evaluation_loss"]
    assert resumed["evaluation_loss_before"] not in ends


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], ["--steps", "0", "positive whole number"]),
        (["--out"], ["--out", "value"]),
        (["--stepz", "3"], ["--stepz", "--steps"]),
        (["--general", "nothing.tsv"], ["--general nothing.tsv", "no such file"]),
        (["--keep", "nothing.txt"], ["--keep nothing.txt", "random, generated"]),
    ],
)
def test_bad_arguments_of_the_quickstart_are_named(arguments, words):
    command = ["bash", ROOT / "launch" / "quickstart.sh", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"data": "nothing.tsv"}, ["--data", "nothing.tsv", "no such file"]),
        ({"config": "nothing.json"}, ["--deepspeed_config", "nothing.json"]),
        (
            {"config": "misspelt.json"},
            ["spectral_ds.filter.strenght", "spectral_ds.filter.strength"],
        ),
    ],
)
def test_bad_input_is_one_message(folder, files, words):
    done = finetune(folder, "--output", folder / "bad", **files)
    assert done.code != 0
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "finetune:" in line]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"CXX": "/nonexistent/c++"}, ["C++ compiler", "/nonexistent/c++"]),
        ({"PYTHON": "/nonexistent/python"}, ["Python 3.10", "/nonexistent/python"]),
    ],
)
def test_setup_says_what_is_missing_before_it_starts(tmp_path, environment, words):
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "setup.sh", tmp_path / "launch")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = subprocess.run(
        ["bash", tmp_path / "launch" / "setup.sh"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert done.returncode != 0
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / ".venv").exists()
