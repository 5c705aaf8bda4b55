"""Skeleton: a model without memory for its weights, whose parameters come from files, and go again.

Built like any model of transformers, with its buffers; parameters are on the meta device until they
are filled. So a model of any size can be called part by part.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import nn

from spectral_ds.cli.errors import UserError
from spectral_ds.cli.merge.architecture import Architecture, class_of
from spectral_ds.cli.merge.folder import Tensors


class Skeleton:
    """A model in evaluation, in float32 where it is filled.

    Args:
        source: where its tensors are.

    Attributes:
        model: whose parameters stay the same objects, filled or not.
        architecture: of it.
    """

    def __init__(self, source: Tensors) -> None:
        self._source = source
        config = copy.deepcopy(source.config)
        kind = class_of(config)
        make = getattr(kind, "_from_config", None) or kind.from_config
        with _parameters_without_memory():
            self.model: nn.Module = make(config, dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        self.architecture = Architecture(self.model)
        # By the first tensor that is made of them: names in the file, and their patterns.
        self._stored: dict[str, dict[str, str]] = {}
        self._first_of: dict[str, str] = {}
        for name in self.architecture.order(source.stored):
            target, pattern, _ = self.architecture.mapping.target_of(name)
            self._stored.setdefault(target, {})[name] = pattern
            for each in self.architecture.mapping.targets_of(target, pattern):
                self._first_of[each] = target
        self._fill_buffers()

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """By name within the base model: all names of a parameter; of tied ones there are more."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        found = {n: names[id(p)] for n, p in self.model.named_parameters()}
        return {self.architecture.short(name): all_ for name, all_ in found.items()}

    def inside(self, prefix: str) -> list[str]:
        """Parameters whose names within the base model begin so."""
        return [name for name in self.architecture.parameters if name.startswith(prefix)]

    def fill(self, names: Iterable[str]) -> None:
        """Read parameters, by name within the base model; those that are there stay as they are.

        Raises:
            UserError: they are not stored, or in another shape.
        """
        wanted = {n for n in names if self.architecture.parameters[n].is_meta}
        while wanted:
            name = min(wanted)
            for found, tensor in self._read(name).items():
                if found in wanted:
                    parameter = self.architecture.parameters[found]
                    if tensor.shape != parameter.shape:
                        raise UserError(
                            f"{self._source.given}: {found} is stored as {tuple(tensor.shape)}, "
                            f"and the model has {tuple(parameter.shape)}"
                        )
                    own = tensor.to(torch.float32, copy=True).contiguous()
                    _become(parameter, own)
                    wanted.discard(found)

    def release(self, names: Iterable[str]) -> None:
        """Give the memory of parameters back."""
        for name in names:
            parameter = self.architecture.parameters[name]
            _become(parameter, torch.empty_like(parameter, device="meta"))

    def _read(self, name: str) -> dict[str, torch.Tensor]:
        """A parameter, and what is made with it."""
        firsts = [self._first_of[each] for each in self._names[name] if each in self._first_of]
        if not firsts:
            raise UserError(f"{self._source.given}: lacks {name}, which its model has")
        found = self.architecture.mapping.converted(
            firsts[0], self._stored[firsts[0]], self._source.read
        )
        short = self.architecture.short
        of_any_name = {each: n for n, all_ in self._names.items() for each in all_}
        made = {of_any_name.get(each, short(each)): tensor for each, tensor in found.items()}
        if name not in made:
            raise UserError(f"{self._source.given}: transformers makes no {name} of {firsts[0]}")
        return made

    def _fill_buffers(self) -> None:
        buffers = dict(self.model.named_buffers())
        for target in self._stored.keys() & buffers.keys():
            found = self.architecture.mapping.converted(
                target, self._stored[target], self._source.read
            )
            buffers[target].copy_(found[target])


def _become(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Give a parameter other memory; it stays the same object, wherever it is tied."""
    torch.utils.swap_tensors(parameter, nn.Parameter(value, requires_grad=False))


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Parameters of modules that are built meanwhile lose their memory; buffers keep it."""
    register = nn.Module.register_parameter

    def without(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = without  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
