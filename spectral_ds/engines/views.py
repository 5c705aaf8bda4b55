"""Flat, real, writable views of parameters and their gradients, whatever these are like.

A complex number counts as two real ones: a filter is real and linear, so that real and imaginary
parts are columns of one node. Without a flat view there is nothing to write to: such parameters are
refused at attach, such gradients are replaced by plain ones of equal values.
"""

from collections.abc import Iterable, Mapping

import torch

from spectral_ds.engines.base import UnsupportedEngineError


def real_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of a parameter in real numbers: of complex ones, the last dimension doubles."""
    shape = tuple(parameter.shape)
    if not parameter.is_complex():
        return shape
    return (*shape[:-1], 2 * shape[-1]) if shape else (2,)


def flat_view(tensor: torch.Tensor) -> torch.Tensor:
    """All elements of a contiguous tensor as a flat view; of complex ones, both parts."""
    return torch.view_as_real(tensor).view(-1) if tensor.is_complex() else tensor.view(-1)


def plain_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """The gradient of a parameter; contiguous, so that element i is that of the parameter's i-th.

    In the place of one that is not, as loops that assign gradients make them, the parameter gets
    a copy. None if there is none, or if it is sparse.
    """
    gradient = parameter.grad
    if gradient is None or is_sparse(gradient):
        return None
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    if not local.is_contiguous() or local.is_conj() or local.is_neg():
        gradient = gradient.contiguous().resolve_conj().resolve_neg()
        parameter.grad = gradient
    return gradient


def is_sparse(gradient: torch.Tensor) -> bool:
    """Whether a tensor holds some of its elements only."""
    return gradient.layout is not torch.strided


def sparse_among(named: Mapping[str, torch.Tensor]) -> frozenset[str]:
    """The names of the parameters whose gradients are sparse now."""
    return frozenset(name for name, p in named.items() if p.grad is not None and is_sparse(p.grad))


def refuse_without_view(named: Mapping[str, torch.Tensor]) -> None:
    """Raise UnsupportedEngineError for the first parameter that has no flat view."""
    for name, parameter in named.items():
        if not parameter.is_contiguous():
            raise UnsupportedEngineError(
                f"parameter {name!r} is not contiguous in memory (strides {parameter.stride()}), "
                "so it has no flat view; make it contiguous"
            )


def refuse_complex(named: Iterable[tuple[str, torch.Tensor]], engine: str) -> None:
    """Raise UnsupportedEngineError for the first complex parameter.

    Args:
        engine: what does not train complex parameters.
    """
    for name, parameter in named:
        if parameter.is_complex():
            raise UnsupportedEngineError(
                f"parameter {name!r} is complex, and {engine} keeps weights and gradients as real "
                "numbers; keep its real and imaginary parts as a parameter of twice as many "
                "elements (torch.view_as_complex takes it), or train with DDP"
            )
