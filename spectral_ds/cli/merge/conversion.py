"""Conversion: what files name and hold otherwise than the model, by transformers' own mapping."""

import copy
from collections.abc import Callable
from collections.abc import Mapping as ReadOnly
from typing import Any

import torch
from torch import nn


class Mapping:
    """From names in files to names in a model, as `from_pretrained` has it."""

    def __init__(self, model: nn.Module) -> None:
        self._prefix: Any = getattr(type(model), "base_model_prefix", "")
        self._model: Any = model
        self._state = dict(model.state_dict())
        self._rename: Any = None
        self._renamings: list[Any] = []
        self._converters: list[Any] = []
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import (
                WeightConverter,
                WeightRenaming,
                rename_source_key,
            )
        except ImportError:  # transformers 4, whose names in files are those in the model
            return
        mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        self._rename = rename_source_key
        self._renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        self._converters = [each for each in mapping if isinstance(each, WeightConverter)]

    def target_of(self, name: str) -> tuple[str, str, list[Any]]:
        """The name in the model, the pattern of the conversion and its operations."""
        if self._rename is not None:
            target, pattern = self._rename(
                name, self._renamings, self._converters, self._prefix, self._state
            )
            if target in self._state:
                operations = [
                    operation
                    for each in self._converters
                    if pattern is not None and pattern in each.source_patterns
                    for operation in each.operations
                ]
                return target, pattern or "", operations
        for target in (name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")):
            if target in self._state:
                return target, "", []
        return name, "", []

    def targets_of(self, target: str, pattern: str) -> list[str]:
        """All tensors of the model that a conversion makes, by the first of them."""
        converter = self._converter_of(pattern)
        if converter is None:
            return [target]
        first, *others = converter.target_patterns
        return [target, *(target.replace(first, each) for each in others)]

    def converted(
        self, target: str, stored: ReadOnly[str, str], read: Callable[[str], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Tensors of the model, by name, made of those that are stored.

        Args:
            target: the first of them.
            stored: names in the file, in the order in which they count, and the pattern of each.
            read: gives a stored tensor.
        """
        name, pattern = next(iter(stored.items()))
        known = self._converter_of(pattern)
        if known is None:
            return {target: read(name)}
        converter = copy.deepcopy(known)
        for each, its_pattern in stored.items():
            converter.add_tensor(target, each, its_pattern, lambda each=each: read(each))
        found = converter.convert(target, model=self._model, config=self._model.config)
        return {
            name: tensor[0] if isinstance(tensor, list) else tensor
            for name, tensor in found.items()
        }

    def _converter_of(self, pattern: str) -> Any:
        return next((c for c in self._converters if pattern in c.source_patterns), None)
