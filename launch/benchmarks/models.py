"""Models in the shapes of real ones, with random weights."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_ds.cli.plan.models import KNOWN_MODELS

MODELS = ("smollm2-135m", "llama-3-8b")
SMALLEST = MODELS[0]


def blocks_of(name: str) -> int:
    """How many blocks a model has."""
    return int(KNOWN_MODELS[name]["num_hidden_layers"])


def make_model(name: str, device: torch.device, **changes: Any) -> Any:
    """A model of one of `MODELS`, on the device; `changes` are keys of its configuration."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**KNOWN_MODELS[name], **changes})
    with device:
        return LlamaForCausalLM(config)
