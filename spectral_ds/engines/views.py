"""Flat, real, writable views of parameters and their gradients, whatever these are like.

A complex number counts as two real ones: a filter is real and linear, so that real and imaginary
parts are columns of one node. Without a flat view there is nothing to write to: such parameters are
refused at attach, such gradients are replaced by plain ones of equal values.
"""

from collections.abc import Callable, Mapping

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


def reason_without_view(parameter: torch.Tensor) -> str | None:
    """Why a parameter has no flat view; None: it has one."""
    if parameter.is_contiguous():
        return None
    return (
        f"is not contiguous in memory (strides {parameter.stride()}), so it has no flat view; make "
        "it contiguous"
    )


def reason_against_complex(parameter: torch.Tensor, engine: str) -> str | None:
    """Why a parameter cannot be trained, if it is complex; None: it is not.

    Args:
        engine: what does not train complex parameters.
    """
    if not parameter.is_complex():
        return None
    return (
        f"is complex, and {engine} keeps weights and gradients as real numbers; keep its real and "
        "imaginary parts as a parameter of twice as many elements (torch.view_as_complex takes "
        "it), or train with DDP"
    )


def refuse(named: Mapping[str, torch.Tensor], reason: Callable[[torch.Tensor], str | None]) -> None:
    """Raise UnsupportedEngineError for the first parameter against which there is a reason.

    Args:
        named: by name.
        reason: gives it, or None.
    """
    for name, parameter in named.items():
        if (why := reason(parameter)) is not None:
            raise UnsupportedEngineError(f"parameter {name!r} {why}")


def refuse_complex(named: Mapping[str, torch.Tensor], engine: str) -> None:
    """Raise UnsupportedEngineError for the first complex parameter.

    Args:
        named: by name.
        engine: what does not train complex parameters.
    """
    refuse(named, lambda parameter: reason_against_complex(parameter, engine))
