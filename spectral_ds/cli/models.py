"""Models from a local folder, from the hub or from a .gguf file."""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spectral_ds.cli.errors import UserError

CAUSAL = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Source:
    """Where a model lies.

    Attributes:
        given: as the user wrote it.
        name: folder or name on the hub.
        options: further arguments of `from_pretrained`.
    """

    given: str
    name: str
    options: dict[str, str]

    @property
    def is_gguf(self) -> bool:
        return "gguf_file" in self.options

    @classmethod
    def of(cls, given: str) -> "Source":
        """A folder, a .gguf file, or else a name on the hub.

        Raises:
            UserError: it looks like a path, and there is nothing.
        """
        path = Path(given)
        is_gguf = given.endswith(".gguf")
        looks_like_path = path.is_absolute() or given.startswith(".") or given.count("/") > 1
        if not path.exists() and (is_gguf or looks_like_path):
            raise UserError(f"{given}: no such file or folder")
        if path.is_file() and not is_gguf:
            raise UserError(f"{given}: is neither a model's folder nor a .gguf file")
        if is_gguf:
            return cls(given, str(path.parent), {"gguf_file": path.name})
        return cls(given, given, {})

    def load(self, kind: Any, **settings: Any) -> Any:
        """`kind.from_pretrained` of it.

        Raises:
            UserError: it cannot be loaded.
        """
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # announces each retry
        try:
            return kind.from_pretrained(
                self.name, trust_remote_code=False, **self.options, **settings
            )
        except Exception as error:  # there is no end to what a broken file raises
            is_offline = not Path(self.name).exists() and os.environ.get("HF_HUB_OFFLINE")
            offline = " (HF_HUB_OFFLINE is set)" if is_offline else ""
            reason = " ".join(str(error).split())
            raise UserError(f"{self.given}: cannot be loaded{offline}: {reason}") from error

    def configuration(self) -> Any:
        """The model's own configuration; `architectures`, if it has any, can be asked for a class.

        Raises:
            UserError: it cannot be loaded, or its first architecture is no model.
        """
        import transformers

        found = self.load(transformers.AutoConfig)
        names = found.architectures or [CAUSAL[0]]
        is_named = isinstance(names, list | tuple) and isinstance(names[0], str)
        # Those that transformers does not have are taken without their head.
        kind = getattr(transformers, names[0], transformers.AutoModel) if is_named else None
        if not (hasattr(kind, "from_config") or hasattr(kind, "_from_config")):
            raise UserError(
                f"{self.given}: architectures = {json.dumps(names)}: must be a list of names of "
                "classes of models"
            )
        return found


def load_model(source: Source, trains: bool) -> tuple[torch.nn.Module, bool]:
    """The model in float32, and whether it is a causal language model.

    It has the head that it was saved with, so that its parameters have the names they have in
    training.

    Args:
        trains: whether its loss is wanted: other models than causal ones then get the head of a
            masked language model, a new one if they were saved with another.

    Raises:
        UserError: it cannot be loaded, or has no loss on text alone.
    """
    import transformers

    settings = source.configuration()
    architecture = (settings.architectures or [f"Unnamed{CAUSAL[0]}"])[0]
    if architecture.endswith(CAUSAL):
        kind: Any = transformers.AutoModelForCausalLM
    elif trains:
        if type(settings) not in transformers.MODEL_FOR_MASKED_LM_MAPPING:
            raise UserError(
                f"{source.given}: --data needs a causal or a masked language model, and this is "
                f"{architecture}"
            )
        torch.manual_seed(0)  # of a new head
        kind = transformers.AutoModelForMaskedLM
    else:
        kind = getattr(transformers, architecture, transformers.AutoModel)
    model: torch.nn.Module = source.load(kind, dtype=torch.float32)
    return model, architecture.endswith(CAUSAL)


def plain_folder(source: Source, target: Path) -> Path:
    """A local folder of the model with plain float32 weights and its tokenizer.

    Args:
        source: a folder is taken as it is.
        target: is written for any other, unless it is there.

    Raises:
        UserError: it cannot be loaded.
    """
    import transformers

    if Path(source.name).is_dir() and not source.is_gguf:
        return Path(source.name)
    if (target / "config.json").exists():
        return target
    settings = source.configuration()
    architecture = (settings.architectures or [f"Unnamed{CAUSAL[0]}"])[0]
    is_causal = architecture.endswith(CAUSAL)
    kind: Any = transformers.AutoModelForCausalLM if is_causal else transformers.AutoModel
    model = as_plain(source.load(kind, dtype=torch.float32))
    load_tokenizer(source).save_pretrained(target)
    model.save_pretrained(target)
    return target


def as_plain(model: Any) -> Any:
    """A model that was loaded from a .gguf file, no longer marked as quantized: it is not."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
        del model.config.quantization_config
    return model


def load_tokenizer(source: Source) -> Any:
    """The model's tokenizer.

    Raises:
        UserError: there is none.
    """
    import transformers

    return source.load(transformers.AutoTokenizer)


def refuse_longer(sequence_length: int, model: Any) -> None:
    """Refuse sequences that a model has no positions for.

    Raises:
        UserError: `--sequence-length` is above its longest.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise UserError(f"--sequence-length {sequence_length}: the model's longest is {longest}")
