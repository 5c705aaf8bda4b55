"""Architecture: which matrix of a model a stored tensor is, and what that matrix multiplies.

A model is built without memory for its weights. Its parameters go by their name within its base
model (`encoder.layer.0…`, not `bert.encoder.layer.0…`), so that models with different heads have
the same names. Files may have others, and hold in several tensors what the model has in one
(experts): transformers' own mapping tells.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from spectral_ds.cli.errors import UserError
from spectral_ds.cli.merge.conversion import Mapping
from spectral_ds.cli.merge.folder import Stored
from spectral_ds.cli.models import CAUSAL
from spectral_ds.coactivation import Site, sites_of
from spectral_ds.graph import ParameterNodes, parameter_nodes
from spectral_ds.stack import facts_of


@dataclass(frozen=True)
class Place:
    """Which part of which parameter a stored tensor is.

    Attributes:
        parameter: its name within the base model.
        pattern: of several tensors that make up the parameter, which kind; "" if it is all of it.
        index: which of that kind.
        is_turned: whether it is transposed when it is loaded.
        is_one_of_a_stack: whether it is the matrix of number `index`.
    """

    parameter: str
    pattern: str = ""
    index: int = 0
    is_turned: bool = False
    is_one_of_a_stack: bool = False

    @property
    def key(self) -> tuple[str, str, int]:
        return self.parameter, self.pattern, self.index


@dataclass(frozen=True)
class Matrices:
    """A stored tensor as the matrices that multiply the inputs of a site.

    Attributes:
        parameter: whose site it is.
        first: number of the first matrix.
        count: how many there are.
        is_input_first: whether they lie as (inputs, outputs).
    """

    parameter: str
    first: int
    count: int
    is_input_first: bool

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """(count, outputs, inputs), a view of a contiguous tensor."""
        if self.is_input_first:
            return tensor.reshape(self.count, *tensor.shape[-2:]).transpose(1, 2)
        outputs = tensor.shape[1] if self.count > 1 else tensor.shape[0]
        return tensor.reshape(self.count, outputs, -1)


class Architecture:
    """A model of a class of transformers.

    Args:
        model: whose weights need not be there.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        prefix: Any = getattr(type(model), "base_model_prefix", "")
        self.prefix = f"{prefix}." if prefix and hasattr(model, prefix) else ""

    @classmethod
    def of(cls, config: Any, given: str) -> "Architecture":
        """Of a configuration, without memory for weights.

        Raises:
            UserError: transformers does not know it.
        """
        kind = class_of(config)
        try:
            with torch.device("meta"):
                make = getattr(kind, "_from_config", None) or kind.from_config
                model: nn.Module = make(config)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{given}: cannot be built by transformers: {reason}") from error
        return cls(model)

    def short(self, name: str) -> str:
        """The name of a parameter within the base model."""
        return name.removeprefix(self.prefix)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By name within the base model."""
        return {self.short(name): p for name, p in self.model.named_parameters()}

    @cached_property
    def names(self) -> dict[str, list[str]]:
        """All names of each parameter by each of them, within the base model; tied have several."""
        held: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            held.setdefault(id(parameter), []).append(self.short(name))
        return {name: names for names in held.values() for name in names}

    @cached_property
    def nodes(self) -> dict[str, ParameterNodes]:
        """The inputs of each matrix, by name within the base model."""
        shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        storage = facts_of([self.model], self.parameters).storage
        return parameter_nodes(shapes, "column", storage)

    @cached_property
    def _embeddings(self) -> set[str]:
        held = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        return {name for name, p in self.parameters.items() if id(p) in held}

    @cached_property
    def sites(self) -> dict[str, Site]:
        """By name within the base model; tied output embeddings are embeddings."""
        named = {n: p for n, p in self.parameters.items() if n not in self._embeddings}
        shapes = {
            name: (nodes.matrices, nodes.width, nodes.nodes_of_matrix)
            for name in named
            if len((nodes := self.nodes[name]).matrix_shape) > 1
        }
        return {site.parameter: site for site in sites_of(self.model.modules(), named, shapes)}

    @staticmethod
    def order(names: Iterable[str]) -> list[str]:
        """Names in a file in the order in which they make up a tensor: experts by their numbers."""
        return sorted(names, key=_by_numbers)

    @cached_property
    def mapping(self) -> Mapping:
        """From names in files to names in the model."""
        return Mapping(self.model)

    def places(self, names: Iterable[str]) -> dict[str, Place]:
        """Where tensors of a file go in the model, by their names in the file."""
        found: dict[str, Place] = {}
        count: dict[tuple[str, str], int] = {}
        mapping = self.mapping
        for name in self.order(names):
            target, pattern, operations = mapping.target_of(name)
            index = count.get((target, pattern), 0)
            count[target, pattern] = index + 1
            kinds = [type(operation).__name__ for operation in operations]
            found[name] = Place(
                self.short(target),
                pattern,
                index if pattern else 0,
                kinds.count("Transpose") % 2 == 1,
                "MergeModulelist" in kinds,
            )
        return found

    def is_blind(self, place: Place) -> bool:
        """Whether a parameter is a matrix, and what it multiplies cannot be watched."""
        if place.parameter in self.sites or place.parameter in self._embeddings:
            return False
        nodes = self.nodes.get(place.parameter)
        return nodes is not None and len(nodes.matrix_shape) > 1

    def matrices(self, name: str, place: Place, stored: Stored) -> Matrices | None:
        """How a stored tensor multiplies the inputs of its site; None if it has none.

        Raises:
            UserError: it has one, and does not lie as it should.
        """
        site = self.sites.get(place.parameter)
        if site is None:
            return None
        is_input_first = self.nodes[place.parameter].storage.is_input_first != place.is_turned
        is_one = site.matrices == 1 or place.is_one_of_a_stack
        found = Matrices(
            place.parameter,
            place.index if place.is_one_of_a_stack else 0,
            1 if is_one else site.matrices,
            is_input_first,
        )
        dimensions = stored.shape if is_one else stored.shape[1:]
        inputs = dimensions[0] if is_input_first else torch.Size(dimensions[1:]).numel()
        if len(dimensions) < 2 or inputs != site.inputs:
            raise UserError(
                f"{name}: is stored as {tuple(stored.shape)}, and the model multiplies "
                f"{site.inputs} inputs by it; save the model again with this transformers"
            )
        return found


def class_of(config: Any) -> Any:
    """The class of transformers that a model was saved with."""
    import transformers

    if (kind := getattr(transformers, _name_of(config), None)) is not None:
        return kind
    return transformers.AutoModelForCausalLM if is_causal(config) else transformers.AutoModel


def is_causal(config: Any) -> bool:
    """Whether a model was saved as a causal language model."""
    return _name_of(config).endswith(CAUSAL)


def _name_of(config: Any) -> str:
    names: list[str] = getattr(config, "architectures", None) or [f"Unnamed{CAUSAL[0]}"]
    return names[0]


def _by_numbers(name: str) -> list[tuple[int, int | str]]:
    """Experts in the order of their numbers."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]
