"""The command line: texts that it reads, each wrong input, and `env` against importlib."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from commands import run, write_model

import spectral_ds
from spectral_ds.cli import env, main, parse
from spectral_ds.cli.inspect.batches import token_batches
from spectral_ds.laplacian import kernels
from spectral_ds.text import DataError, read_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("cli"))


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
        bos_token_id, eos_token_id = None, 0

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
        (["inspect", "{f}/model", "a=1"], "unrecognized arguments: a=1"),
        (["compare", "--config", "x", "a=1", "--out", "y", "b"], "unrecognized arguments: b"),
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


def test_settings_may_stand_anywhere():
    words = ["compare", "--config", "x", "a=1", "b=2", "--out", "y", "c=3", "--resume"]
    assert parse(words).overrides == ["a=1", "b=2", "c=3"]


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
    assert found["kernels"].keys() == {"torch_csr", "torch_sparse", "embedding_bag", "dense"}
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
