"""A tiny model with its tokenizer, and a corpus, as files that launch/finetune.py takes."""

from pathlib import Path

import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["a", "fine", "film", "with", "no", "plot", "but", "the", "best", "cast", "this", "year"]
REVIEWS, OTHERS = 160, 40


def write(folder: Path) -> None:
    """`model`, `reviews.tsv`, and `other.txt`, of another kind."""
    vocabulary = {word: i for i, word in enumerate(["<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(
        tiny.llama_config(
            vocab_size=len(vocabulary), max_position_embeddings=64, eos_token_id=0, bos_token_id=0
        )
    ).save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)

    def text() -> str:
        return " ".join(WORDS[j] for j in torch.randint(len(WORDS), (12,), generator=generator))

    lines = [f"{i}\t{i % 3 - 1}\t{text()}" for i in range(REVIEWS)]
    (folder / "reviews.tsv").write_text("\n".join(lines) + "\n")
    (folder / "other.txt").write_text("\n".join(text() for _ in range(OTHERS)) + "\n")
