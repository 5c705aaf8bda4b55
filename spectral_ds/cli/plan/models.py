"""Models as shapes: known ones, folders, .gguf files and names on the hub; no weight is loaded."""

from typing import Any

import torch

from spectral_ds.cli.errors import UserError
from spectral_ds.cli.models import CAUSAL, Source
from spectral_ds.planning.planner import Model

_LLAMA_3 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
# As values of a `LlamaConfig`.
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3-70b": {
        **_LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
}


def model_of(given: str) -> Model:
    """The shapes of a known model or of a model's own configuration.

    Raises:
        UserError: there is no such model, or it has no configuration.
    """
    import transformers

    kind: Any = transformers.AutoModelForCausalLM
    if given in KNOWN_MODELS:
        settings: Any = transformers.LlamaConfig(**KNOWN_MODELS[given])
    else:
        settings = Source.of(given).configuration()
        architecture = (settings.architectures or [CAUSAL[0]])[0]
        if not architecture.endswith(CAUSAL):
            kind = getattr(transformers, architecture, transformers.AutoModel)
        elif type(settings) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            kind = transformers.AutoModel
    # Classes of one architecture have no public `from_config`.
    make = getattr(kind, "from_config", None) or kind._from_config
    try:
        with torch.device("meta"):
            model = make(settings)
    except Exception as error:  # there is no end to what a configuration makes layers raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{given}: its configuration makes no model: {reason}") from error
    if empty := [name for name, each in model.named_parameters() if each.numel() == 0]:
        raise UserError(f"{given}: its configuration makes no model: {empty[0]} has no elements")
    return Model.of(given, model)
