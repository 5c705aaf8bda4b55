"""What enters the matrices of stacked experts: seen inside of their module, product by product.

Which tokens an expert gets, and what its second matrix gets, no hook of the module can tell.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from spectral_ds.coactivation.sites import Site

# What multiplies activations by a matrix, and which of its arguments are the activations: ZeRO-3
# puts `addmm` and `matmul` with the transposed matrix in place of `functional.linear`.
PRODUCTS: dict[Callable[..., Any], int] = {
    torch._C._nn.linear: 0,
    torch.matmul: 0,
    torch.mm: 0,
    torch.Tensor.matmul: 0,
    torch.Tensor.mm: 0,
    torch.Tensor.__matmul__: 0,
    torch.addmm: 1,
}
TRANSPOSES: frozenset[Callable[..., Any]] = frozenset(
    (
        torch.t,
        torch.transpose,
        torch.Tensor.t,
        torch.Tensor.transpose,
        torch.Tensor.T.__get__,  # type: ignore[attr-defined]
        torch.Tensor.mT.__get__,  # type: ignore[attr-defined]
    )
)

# Adds vectors that enter a matrix of a site.
Add = Callable[[Site, torch.Tensor, None, int], None]


class ExpertsInside(TorchFunctionMode):
    """On while a module of stacked experts computes, one expert after another.

    Transformers computes all at once where `_experts_implementation` says so; not while this is on.

    Args:
        sites: of the module.
        add: takes what enters them.
    """

    def __init__(self, sites: Sequence[Site], add: Add) -> None:
        super().__init__()
        self._sites, self._add = sites, add
        self._matrices: dict[int, tuple[torch.Tensor, Site, int]] = {}
        self._usual: Any = None

    def enter(self, module: nn.Module, *_: Any) -> None:
        """A forward pre-hook."""
        config: Any = getattr(module, "config", None)
        self._usual = getattr(config, "_experts_implementation", None)
        if self._usual is not None:
            config._experts_implementation = "eager"
        self.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, *_: Any) -> None:
        """A forward hook."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._matrices.clear()
        if self._usual is not None:
            config: Any = module.config
            config._experts_implementation = self._usual

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.__getitem__:
            for site in self._sites:
                if args[0] is getattr(site.module, site.attribute) and _is_one(args[1]):
                    self._matrices[id(result)] = result, site, int(args[1])
        elif args and func in TRANSPOSES and (found := self._matrices.get(id(args[0]))):
            self._matrices[id(result)] = result, *found[1:]
        elif func in PRODUCTS:
            operands = args[PRODUCTS[func] :]
            if len(operands) > 1 and (found := self._matrices.get(id(operands[1]))):
                (_, site, matrix), x = found, operands[0]
                with torch.no_grad(), torch._C.DisableTorchFunction():
                    self._add(site, x.reshape(-1, site.inputs), None, matrix)
        return result


def _is_one(index: Any) -> bool:
    """Whether an index takes one matrix out of several."""
    is_number = isinstance(index, torch.Tensor) and index.numel() == 1 and index.dtype == torch.long
    return is_number or type(index) is int
