"""Models in the shapes of real ones, with random weights."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Shape:
    """A model of Llama's architecture: keys of `LlamaConfig`, and its name for people."""

    name: str
    keys: dict[str, Any]

    @property
    def blocks(self) -> int:
        return int(self.keys["num_hidden_layers"])

    @property
    def vocabulary(self) -> int:
        return int(self.keys["vocab_size"])


SHAPES = {
    "smollm2": Shape(
        "SmolLM2-135M",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3-8b": Shape(
        "Llama-3-8B",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": False,
        },
    ),
}


def make_model(
    shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A model with random weights, made on the device; `changes` are keys of its configuration."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**shape.keys, **changes})
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(usual)
