"""Commands of `spectral-ds` on a tiny model, in this process."""

import contextlib
import io
import json

import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from spectral_ds.cli import main
from spectral_ds.cli.inspect.model_under_test import ModelUnderTest

WORDS = ["a", "fine", "film", "with", "no", "plot", "but", "the", "best", "cast", "this", "year"]


HEADS, KEY_HEADS = 4, 2


def write_model(path):
    """A tiny Llama with its tokenizer, and a text."""
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


def linear_model(rows, columns):
    torch.manual_seed(0)
    return ModelUnderTest(torch.nn.Linear(columns, rows, bias=False), seed=0)


def distinct(values):
    kept = []
    for value in values:
        if not kept or value - kept[-1] > 1e-6:
            kept.append(value)
    return kept
