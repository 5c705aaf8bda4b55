"""launch/finetune.py says in one line why it cannot resume, and runs no code of a model folder."""

import argparse
import builtins
import importlib
import json
from pathlib import Path

import corpus
import pytest
from launching import forked

LAUNCH = Path(__file__).parent.parent / "launch"


@pytest.fixture(scope="module")
def folder(processes, tmp_path_factory):
    """A model, a corpus, configurations of two graphs, and a checkpoint with the first."""
    path = tmp_path_factory.mktemp("finetune")
    corpus.write(path)
    config = json.loads((LAUNCH.parent / "configs" / "zero2_spectral.json").read_text())
    config["zero_optimization"]["stage"] = 3
    (path / "first.json").write_text(json.dumps(config))
    config["spectral_ds"]["seed"] = 5
    (path / "other.json").write_text(json.dumps(config))
    done = finetune(path, 2, "first.json", "--save-interval", 1)
    assert done.code == 0, done.stderr
    return path


def finetune(folder, world_size, config, *arguments):
    words = ["--model", folder / "model", "--data", folder / "reviews.tsv", "--steps", 1]
    words += ["--deepspeed_config", folder / config, "--sequence-length", 16]
    words += ["--evaluation-batches", 0, "--output", folder / "output", *arguments]
    return forked(world_size, LAUNCH / "finetune.py", *words, runner=False)


@pytest.mark.parametrize(
    ("world_size", "config", "message"),
    [
        (2, "other.json", "another graph configuration"),
        (1, "first.json", "was saved at world size 2, and this run has 1"),
    ],
)
def test_what_cannot_be_resumed_is_one_line(folder, world_size, config, message):
    done = finetune(folder, world_size, config, "--resume")
    assert done.code != 0
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "finetune:" in line]
    assert len(lines) == 1, done.stderr
    assert "--resume" in lines[0]
    assert message in lines[0]


def test_code_in_a_models_folder_is_not_run(tmp_path, monkeypatch):
    """Also if somebody, or a script, answers yes to what transformers asks."""
    marker = tmp_path / "has_run"
    (tmp_path / "remote.py").write_text(
        "from transformers import PretrainedConfig\n"
        f"open({str(marker)!r}, 'w').close()\n"
        "class Remote(PretrainedConfig):\n"
        "    model_type = 'remote'\n"
    )
    config = {"model_type": "remote", "auto_map": {"AutoConfig": "remote.Remote"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.syspath_prepend(LAUNCH)
    script = importlib.import_module("finetune")
    arguments = argparse.Namespace(model=str(tmp_path), task="causal-lm", sequence_length=16)
    with pytest.raises(script.UserError, match="cannot be loaded"):
        script.load_model(arguments, 2)
    assert not marker.exists()
