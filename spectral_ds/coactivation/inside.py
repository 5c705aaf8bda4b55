"""What enters matrices that only the inside of their module shows, product by product.

Which tokens an expert of a stack gets, and what its second matrix gets, no hook of the module can
tell. A router multiplies by a parameter of its own, and is no `nn.Linear`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from spectral_ds.coactivation.rows import Rows
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
# What gives a matrix again: turned, or in another dtype.
THE_SAME: frozenset[Callable[..., Any]] = frozenset(
    (
        torch.t,
        torch.transpose,
        torch.Tensor.t,
        torch.Tensor.transpose,
        torch.Tensor.T.__get__,  # type: ignore[attr-defined]
        torch.Tensor.mT.__get__,  # type: ignore[attr-defined]
        torch.Tensor.to,
        torch.Tensor.type,
        torch.Tensor.float,
    )
)

# Adds vectors that enter a matrix of a site; of which some may not count.
Add = Callable[[Site, torch.Tensor, torch.Tensor | None, int], None]
# Which vectors of what enters a module count; None: all do.
Counts = Callable[[torch.Tensor], torch.Tensor | None]


class ProductsInside(TorchFunctionMode):
    """On while a module computes; of stacked experts, one after another.

    Transformers computes all at once where `_experts_implementation` says so; not while this is on.

    Args:
        sites: of the module.
        add: takes what enters them.
        counts: tells padding in the module's inputs.
    """

    def __init__(self, sites: Sequence[Site], add: Add, counts: Counts) -> None:
        super().__init__()
        self._sites, self._add, self._counts = sites, add, counts
        self._matrices: dict[int, tuple[torch.Tensor, Site, int]] = {}
        self._rows = Rows()
        self._usual: Any = None

    def enter(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A forward pre-hook."""
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.Tensor) and (counts := self._counts(x)) is not None:
                self._rows.set(x, counts)
        config: Any = getattr(module, "config", None)
        self._usual = getattr(config, "_experts_implementation", None)
        if self._usual is not None:
            config._experts_implementation = "eager"
        self.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, *_: Any) -> None:
        """A forward hook."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._matrices.clear()
        self._rows.clear()
        if self._usual is not None:
            config: Any = module.config
            config._experts_implementation = self._usual

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            self._see(func, args, kwargs or {}, result)
        return result

    def _see(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        if func is torch.Tensor.__getitem__ and _is_one(args[1]):
            for site in self._sites:
                if site.matrices > 1 and args[0] is getattr(site.module, site.attribute):
                    self._matrices[id(result)] = result, site, int(args[1])
                    return
        elif args and func in THE_SAME and (found := self._matrix(args[0])):
            self._matrices[id(result)] = result, *found
            return
        elif func in PRODUCTS:
            operands = args[PRODUCTS[func] :]
            if len(operands) > 1 and (found := self._matrix(operands[1])):
                (site, matrix), x = found, operands[0]
                counts = self._rows.of(x)
                weight = None if counts is None else counts.reshape(-1)
                self._add(site, x.detach().reshape(-1, site.inputs), weight, matrix)
        with torch.no_grad():
            self._rows.follow(func, args, kwargs, result)

    def _matrix(self, x: object) -> tuple[Site, int] | None:
        """Which matrix of which site this is."""
        if (known := self._matrices.get(id(x))) is not None:
            return known[1:]
        for site in self._sites:
            if site.matrices == 1 and x is getattr(site.module, site.attribute):
                return site, 0
        return None


def _is_one(index: Any) -> bool:
    """Whether an index takes one matrix out of several."""
    is_number = isinstance(index, torch.Tensor) and index.numel() == 1 and index.dtype == torch.long
    return is_number or type(index) is int
