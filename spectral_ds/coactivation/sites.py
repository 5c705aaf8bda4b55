"""Sites: where a model multiplies its activations by which parameter.

In: a model's modules, and its parameters by name. Out: a `Site` for each matrix whose input can be
seen. A row of the parameter's (outputs × inputs) matrix is multiplied by each vector of `inputs`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

# Their weights may have the dimensions of a matrix.
NORMS = (nn.LayerNorm, nn.RMSNorm)
# Gives (vectors, inputs) of what enters a module.
Unfold = Callable[[Any, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Site:
    """A parameter that multiplies what enters its module.

    Attributes:
        parameter: its name.
        module: that holds it.
        inputs: length of the vectors that it multiplies.
        unfold: makes these vectors of the module's input; None for experts and routers, whose
            inputs are seen inside of the module alone.
        attribute: the module's name of the parameter.
        matrices: how many matrices it holds; 1, or the number of stacked experts.
        others: modules of the same kind that hold the parameter too.
    """

    parameter: str
    module: nn.Module
    inputs: int
    unfold: Unfold | None
    attribute: str = "weight"
    matrices: int = 1
    others: tuple[nn.Module, ...] = ()

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All that multiply by it, each once."""
        return self.module, *self.others


def sites_of(
    modules: Iterable[nn.Module],
    named: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, int, int]],
) -> list[Site]:
    """The sites of a model's parameters, in the order of its modules.

    Linear layers, GPT-2's `Conv1D`, convolutions of one group (a vector is a patch), stacked
    experts and routers have one: a router is any other module whose `weight` is a matrix.
    Embeddings (also where the head is the same parameter), norms, biases, complex parameters and
    what multiplies in ways of its own do not.

    Args:
        modules: each once.
        named: the parameters that are asked for, by name.
        shapes: of them: (matrices, outputs, inputs).
    """
    modules = list(modules)
    embedded = {
        id(parameter)
        for module in modules
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    name_of = {
        id(p): name for name, p in named.items() if id(p) not in embedded and not p.is_complex()
    }
    found: dict[str, Site] = {}
    for module in modules:
        for attribute, parameter in module.named_parameters(recurse=False):
            name = name_of.get(id(parameter))
            if name is None or name not in shapes:
                continue
            matrices, _, inputs = shapes[name]
            unfold = _unfold_of(module) if attribute == "weight" else None
            if (first := found.get(name)) is not None:
                if (first.attribute, first.unfold) == (attribute, unfold):
                    found[name] = replace(first, others=(*first.others, module))
                continue
            # Under ZeRO-3 a parameter is flat, or empty, and knows its shape by another name.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            is_stack = matrices > 1 and len(shape) == 3
            is_router = attribute == "weight" and len(shape) == 2 and not isinstance(module, NORMS)
            if unfold is not None or is_stack or is_router:
                found[name] = Site(name, module, inputs, unfold, attribute, matrices)
    return list(found.values())


def _unfold_of(module: nn.Module) -> Unfold | None:
    """How vectors are made of what enters a module; None where that is not known."""
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return tokens
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1 and not module.transposed:
        return _patches
    return None


def tokens(_: Any, x: torch.Tensor) -> torch.Tensor:
    """(vectors, inputs) of (..., inputs)."""
    return x.reshape(-1, x.shape[-1])


def _patches(module: Any, x: torch.Tensor) -> torch.Tensor:
    """(patches, channels × kernel) of (batch, channels, ...), as the kernel is laid out."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if x.dim() == 1 + len(kernel):  # without a batch
        x = x.unsqueeze(0)
    x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    if len(kernel) == 1:  # a line is an image of height 1
        x, kernel, dilation, stride = x.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
    patches = functional.unfold(x, kernel, dilation=dilation, stride=stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])
