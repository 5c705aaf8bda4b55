"""`spectral-ds inspect` of encoders by masked tokens and of the hub's cache; JSON alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import corpus
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from spectral_ds.cli import main
from spectral_ds.cli.inspect import batches

SPECIAL = ["[PAD]", "[SEP]", "[MASK]"]
STEPS = ["--steps", "4", "--batch-size", "2", "--sequence-length", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny causal model in `model`, and a text that suits encoders too."""
    path = tmp_path_factory.mktemp("inspect")
    corpus.write(path)
    return path


def encoder(path, kind, has_mask=True):
    """A tiny BERT, and a tokenizer with or without a mask token."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *corpus.WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    mask = {"mask_token": "[MASK]"} if has_mask else {}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, sep_token="[SEP]", pad_token="[PAD]", **mask
    ).save_pretrained(path)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    kind(
        BertConfig(
            vocab_size=len(vocabulary),
            intermediate_size=24,
            max_position_embeddings=32,
            **size,
        )
    ).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_an_encoder_is_inspected_by_tokens_that_it_is_to_guess(folder, tmp_path, capsys, kind):
    model = encoder(tmp_path / "bert", kind)
    words = ["inspect", model, "--data", str(folder / "reviews.tsv"), *STEPS, "--json"]
    assert main(words) == 0
    summary = json.loads(capsys.readouterr().out)
    found = {each["name"]: each for each in summary["candidates"]}
    assert sum(found["weights similarity, rows"]["noise"]) > 0
    assert found["depth"]["samples"] == 2
    assert any("attention" in role for role in summary["graphs"][0]["roles"])


def test_masked_tokens_alone_are_to_be_guessed():
    class Mask:
        mask_token_id = 99

    tokens = torch.arange(4 * 8 * 64).view(4, 8, 64) % 90
    found = batches.masked(tokens, Mask, seed=0)
    for batch, whole in zip(found, tokens, strict=True):
        hidden = batch["input_ids"] == 99
        assert torch.equal(batch["input_ids"][~hidden], whole[~hidden])
        assert torch.equal(batch["labels"][hidden], whole[hidden])
        assert (batch["labels"][~hidden] == -100).all()  # what torch's cross-entropy leaves out
        assert 0.1 < hidden.float().mean() < 0.2


def test_an_encoder_without_a_mask_token_is_one_line(folder, tmp_path, capsys):
    model = encoder(tmp_path / "bert", BertModel, has_mask=False)
    capsys.readouterr()
    assert main(["inspect", model, "--data", str(folder / "reviews.tsv"), *STEPS]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert "this one's tokenizer has no mask" in line


def test_a_model_without_a_loss_on_text_alone_is_one_line(folder, tmp_path, capsys):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(intermediate_size=24, image_size=8, patch_size=4, **size)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    model = str(tmp_path / "vit")
    capsys.readouterr()
    assert main(["inspect", model, "--data", str(folder / "reviews.tsv"), *STEPS]) == 2
    [line] = capsys.readouterr().err.splitlines()
    words = (
        "--data needs a causal or a masked language model, and this is ViTForImageClassification"
    )
    assert line == f"spectral-ds: {model}: {words}"


def output_of(words, **environment):
    """What the command prints to a pipe."""
    done = subprocess.run(
        [Path(sys.executable).parent / "spectral-ds", *words],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("processes")
def test_a_model_in_the_hubs_cache_is_inspected_by_name_and_json_is_all_that_is_printed(
    folder, tmp_path
):
    place, commit = tmp_path / "models--someone--tiny", "a" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(folder / "model", place / "snapshots" / commit)
    words = ["inspect", "someone/tiny", "--json", "--data", str(folder / "reviews.tsv"), *STEPS]
    summary = json.loads(output_of(words, HF_HUB_CACHE=str(tmp_path)))
    assert summary["model"] == "someone/tiny"
    assert summary["graphs"][0]["whole"]["edges"] > 0
    assert summary["candidates"]
