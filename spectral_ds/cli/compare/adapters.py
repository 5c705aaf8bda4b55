"""Adapters: what of a model is trained, and how it becomes plain weights again."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from spectral_ds.cli.errors import UserError

# Gives the plain model after training.
Unload = Callable[[], nn.Module]


def adapted(name: str, model: Any, options: Mapping[str, Any]) -> tuple[nn.Module, Unload]:
    """A model to train, and what gives its plain weights afterwards.

    A new head is trained whole by all.

    Args:
        name: of `settings.AdapterName`.
        model: of transformers, on its device.
        options: of peft's configuration.

    Raises:
        UserError: peft is missing, or the model has nothing of the kind.
    """
    if name == "none":
        return model, lambda: model
    heads = head_names(model)
    if name == "bitfit":
        biases = [n for n, _ in model.named_parameters() if n.endswith("bias") and n not in heads]
        if not biases:
            raise UserError(f"adapter = bitfit: {type(model).__name__} has no biases")
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name in heads or parameter_name in biases)
        return model, lambda: _all_trainable(model)
    try:
        import peft
    except ImportError:
        raise UserError(f"adapter = {name}: needs peft: pip install peft") from None
    settings = {"target_modules": _linear_layers(model, heads), **options}
    kind: Any = {"lora": peft.LoraConfig, "osf": getattr(peft, "OSFConfig", None)}[name]
    if kind is None:
        raise UserError(f"adapter = {name}: peft {peft.__version__} lacks it")
    wrapped: Any = peft.get_peft_model(model, kind(**settings))
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in heads:
            parameter.requires_grad_(True)
    return wrapped, lambda: _all_trainable(wrapped.merge_and_unload())


def _linear_layers(model: Any, heads: set[str]) -> list[str]:
    """Names of all layers but heads and the output embedding."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and f"{name}.weight" not in heads
        and module is not model.get_output_embeddings()
    ]


def head_names(model: Any) -> set[str]:
    """Names of the parameters of a classifier's new head."""
    if "ForSequenceClassification" not in type(model).__name__:
        return set()
    prefix = f"{model.base_model_prefix}."
    return {name for name, _ in model.named_parameters() if not name.startswith(prefix)}


def _all_trainable(model: nn.Module) -> nn.Module:
    return model.requires_grad_(True)
