"""What the modules of a model tell of its parameters, as plain values.

In: a model's modules, and its parameters by name. Out: `ModelFacts`. A parameter's meaning is that
of the module that holds it; its name alone may mean anything.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from spectral_ds.graph import Storage

# Classes of Hugging Face whose models have a head: what is outside their base model.
HAS_HEAD = re.compile(r"For[A-Z]|Heads?Model$")


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model besides its shapes.

    Attributes:
        head_width: rows of an attention head; None: unknown.
        embeddings: names of the parameters of input and position embeddings; an output embedding
            that is the same parameter is among them.
        heads: of other output embeddings, and of the head of a model with one.
        storage: where matrices do not lie as (outputs, inputs) in their parameters, by name.
        sparse: names of the parameters whose gradients are sparse.
    """

    head_width: int | None = None
    embeddings: frozenset[str] = frozenset()
    heads: frozenset[str] = frozenset()
    storage: Mapping[str, Storage] = field(default_factory=dict)
    sparse: frozenset[str] = frozenset()


def facts_of(holders: Iterable[object], named: Mapping[str, nn.Parameter]) -> ModelFacts:
    """What the modules of a model tell.

    Args:
        holders: modules, and whatever else may hold some.
        named: the parameters that are asked for, by name.
    """
    modules = list(modules_of(holders))
    name_of = {id(parameter): name for name, parameter in named.items()}
    embeddings, heads, sparse = set[str](), set[str](), set[str]()
    storage: dict[str, Storage] = {}
    for module in modules:
        own = dict(module.named_parameters(recurse=False))
        names = {name_of[id(p)] for p in own.values() if id(p) in name_of}
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            embeddings |= names
            sparse |= names if module.sparse else set()
        heads |= {name_of[id(p)] for p in _parameters_of_heads(module) if id(p) in name_of}
        for name, stored in _storage(module, own).items():
            if id(own[name]) in name_of:
                storage[name_of[id(own[name])]] = stored
    return ModelFacts(
        _head_width(modules),
        frozenset(embeddings),
        frozenset(heads - embeddings),
        storage,
        frozenset(sparse),
    )


def modules_of(holders: Iterable[object]) -> Iterator[nn.Module]:
    """All modules, each once."""
    seen = set[int]()
    for holder in holders:
        if isinstance(holder, nn.Module):
            for module in holder.modules():
                if id(module) not in seen:
                    seen.add(id(module))
                    yield module


def _head_width(modules: Iterable[nn.Module]) -> int | None:
    """Rows of an attention head, as the model's own config has it; None if its parts disagree.

    Of a model of several parts, the one that reads text counts, where it says which that is.
    """
    found: set[int] = set()
    for module in modules:
        config: Any = getattr(module, "config", None)
        try:
            of_text = config.get_text_config()
        except (AttributeError, ValueError):  # no config of transformers, or several read text
            of_text = None
        if of_text is not None and (width := _head_width_in(of_text)) is not None:
            return width
        if (width := _head_width_in(config)) is not None:
            found.add(width)
    return found.pop() if len(found) == 1 else None


def _head_width_in(config: Any) -> int | None:
    heads, width = (getattr(config, key, None) for key in ("num_attention_heads", "hidden_size"))
    width_of_one = getattr(config, "head_dim", None)
    if isinstance(heads, int) and heads > 0:  # hierarchical models have a list
        if isinstance(width_of_one, int) and width_of_one > 0:
            return width_of_one
        if isinstance(width, int):
            return width // heads
    return None


def _parameters_of_heads(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a model's output embedding, and of its head."""
    get_output: Any = getattr(module, "get_output_embeddings", None)
    if get_output is not None:
        try:
            output = get_output()
        except (AttributeError, NotImplementedError):  # of models that have none
            output = None
        if isinstance(output, nn.Module):
            yield from output.parameters()
    # Asked of the class: wrappers pass on what they are asked for, and hold more than the head.
    prefix = getattr(type(module), "base_model_prefix", None)
    base = getattr(module, prefix, None) if prefix else None
    if isinstance(base, nn.Module) and HAS_HEAD.search(type(module).__name__):
        inside = {id(parameter) for parameter in base.parameters()}
        yield from (p for p in module.parameters() if id(p) not in inside)


def _storage(module: nn.Module, own: Mapping[str, nn.Parameter]) -> dict[str, Storage]:
    """Where matrices lie in a module's own parameters, if not as (outputs, inputs)."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is not None and isinstance(module, transformers.Conv1D):
        return {"weight": Storage(is_input_first=True)}
    if "Expert" not in type(module).__name__:
        return {}
    shapes = {name: _full_shape(parameter) for name, parameter in own.items()}
    counts = {shape[0] for shape in shapes.values() if len(shape) == 3}
    if not counts:  # each expert is a module of its own, or it is something else
        return {}
    is_input_first = _is_input_first(module, shapes)
    return {
        name: Storage(is_stacked=True, is_input_first=is_input_first and len(shape) == 3)
        for name, shape in shapes.items()
        if len(shape) in (2, 3) and shape[0] in counts
    }


def _is_input_first(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether stacked experts are (experts, inputs, outputs)."""
    says = getattr(module, "is_transposed", None)
    if isinstance(says, bool):
        return says
    up, down = shapes.get("gate_up_proj"), shapes.get("down_proj")
    if up is None or down is None:
        return False
    # The gate and the up projection lie side by side: what enters them is what leaves `down_proj`.
    return up[1] == down[2] and up[2] == 2 * down[1]


def _full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
