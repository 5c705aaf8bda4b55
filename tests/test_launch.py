"""The commands of launch/ as a user runs them, on a tiny model."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
WORDS = ["a", "fine", "film", "with", "no", "plot", "but", "the", "best", "cast", "this", "year"]
TIMEOUT_SECONDS = 180


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a tokenizer, a corpus and two configurations that differ by the section alone."""
    path = tmp_path_factory.mktemp("launch")
    vocabulary = {word: i for i, word in enumerate(["<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(
        path / "model"
    )
    torch.manual_seed(0)
    LlamaForCausalLM(
        tiny.llama_config(
            vocab_size=len(vocabulary), max_position_embeddings=64, eos_token_id=0, bos_token_id=0
        )
    ).save_pretrained(path / "model")
    generator = torch.Generator().manual_seed(0)
    lines = [
        f"{i}\t{i % 3 - 1}\t"
        + " ".join(WORDS[j] for j in torch.randint(len(WORDS), (12,), generator=generator))
        for i in range(80)
    ]
    (path / "reviews.tsv").write_text("\n".join(lines) + "\n")
    (path / "empty.tsv").write_text("\n\n")
    config = json.loads((ROOT / "configs" / "zero2_spectral.json").read_text())
    config["spectral_ds"]["monitor"]["interval"] = 1
    (path / "spectral.json").write_text(json.dumps(config))
    misspelt = {**config, "spectral_ds": {"filter": {"strenght": 1.0}}}
    (path / "misspelt.json").write_text(json.dumps(misspelt))
    del config["spectral_ds"]
    (path / "baseline.json").write_text(json.dumps(config))
    return path


def finetune(folder, *arguments, data="reviews.tsv", config="spectral.json"):
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [launcher, "--num_gpus", "2", "--master_port", str(port), "--log_level", "error"]
    command += [ROOT / "launch" / "finetune.py", "--model", folder / "model"]
    command += ["--data", folder / data, "--deepspeed_config", folder / config]
    command += ["--sequence-length", "16", *arguments]
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": f"{launcher.parent}:{os.environ['PATH']}"},
    )


def summary(folder, name):
    return json.loads((folder / name / "summary.json").read_text())


COMMON_KEYS = {"final_loss", "losses", "perturbation", "step_seconds", "world_size", "zero_stage"}
SPECTRAL_KEYS = {"filter_seconds", "boundary_bytes", "nodes", "edges"}


def test_finetune_runs_with_and_without_the_plugin_and_resumes(folder):
    for name in ("baseline", "spectral"):
        done = finetune(
            folder,
            *("--steps", 4, "--save-interval", 2, "--output", folder / name),
            config=f"{name}.json",
        )
        assert done.returncode == 0, done.stderr
    baseline, spectral = summary(folder, "baseline"), summary(folder, "spectral")
    assert baseline.keys() >= COMMON_KEYS
    assert not baseline.keys() & SPECTRAL_KEYS
    assert spectral.keys() >= COMMON_KEYS | SPECTRAL_KEYS
    for run in (baseline, spectral):
        assert (run["world_size"], run["zero_stage"]) == (2, 2)
        assert len(run["losses"]) == 4
        assert run["final_loss"] == run["losses"][-1]
        assert run["perturbation"] > 0
    # The same weights and the same first batch, then different gradients.
    assert baseline["losses"][0] == spectral["losses"][0]
    assert baseline["losses"][-1] != spectral["losses"][-1]

    [events] = (folder / "spectral").rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    assert "spectral_ds/gradient_norm/after" in tags
    assert "Train/Samples/train_loss" in tags

    shutil.copytree(folder / "spectral" / "checkpoints", folder / "resumed" / "checkpoints")
    (folder / "resumed" / "checkpoints" / "latest").write_text("global_step2")
    done = finetune(folder, "--steps", 4, "--output", folder / "resumed", "--resume")
    assert done.returncode == 0, done.stderr
    assert summary(folder, "resumed")["losses"] == pytest.approx(spectral["losses"], abs=1e-6)

    comparison = subprocess.run(
        [sys.executable, ROOT / "launch" / "compare.py", folder],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "filter time" in comparison.stdout
    assert summary(folder, ".").keys() == {"baseline", "spectral"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"data": "nothing.tsv"}, ["--data", "nothing.tsv", "no such file"]),
        ({"data": "empty.tsv"}, ["--data", "empty.tsv", "no text"]),
        ({"config": "nothing.json"}, ["--deepspeed_config", "nothing.json"]),
        (
            {"config": "misspelt.json"},
            ["spectral_ds.filter.strenght", "spectral_ds.filter.strength"],
        ),
    ],
)
def test_bad_input_is_one_message(folder, files, words):
    done = finetune(folder, "--output", folder / "bad", **files)
    assert done.returncode != 0
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
