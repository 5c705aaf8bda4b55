"""What a filter is held against: copying, AdamW, and optimizers that work on whole matrices."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

Tensors = list[torch.Tensor]
Actions = dict[str, Callable[[], object]]

COPY, ADAMW, MUON = "copy of the gradient", "AdamW, fused", "Muon, 5 Newton-Schulz steps"
# Of the quintic whose iteration orthogonalizes (Jordan et al. 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)
# SOAP turns its bases once in so many steps; a sample is the mean of as many.
SOAP_STEPS = 10


def peers(gradients: Tensors, has_time: bool) -> tuple[Actions, dict[str, str]]:
    """An action each, and why some are missing.

    Args:
        gradients: matrices. Optimizers are given copies of them as weights.
        has_time: whether whole steps of Muon and SOAP are wanted, which take minutes on a CPU.
    """
    copies = [torch.empty_like(gradient) for gradient in gradients]
    dtype = torch.bfloat16 if gradients[0].device.type == "cuda" else torch.float32
    actions: Actions = {
        COPY: lambda: torch._foreach_copy_(copies, gradients),
        ADAMW: optimizer_of(functools.partial(torch.optim.AdamW, fused=True), gradients).step,
        MUON: lambda: newton_schulz(gradients, dtype),
    }
    missing: dict[str, str] = {}
    if has_time:
        _add_whole_steps(gradients, actions, missing)
    return actions, missing


def _add_whole_steps(gradients: Tensors, actions: Actions, missing: dict[str, str]) -> None:
    muon, soap = "torch.optim.Muon, whole step", f"SOAP of pytorch-optimizer, {SOAP_STEPS} steps"
    if hasattr(torch.optim, "Muon"):
        actions[muon] = optimizer_of(torch.optim.Muon, gradients).step
    else:
        missing[muon] = f"torch {torch.__version__} has none"
    try:
        make = importlib.import_module("pytorch_optimizer").SOAP
    except ImportError as error:
        missing[soap] = str(error)
        return
    every = functools.partial(make, precondition_frequency=SOAP_STEPS)
    step = optimizer_of(every, gradients).step
    actions[soap] = lambda: [step() for _ in range(SOAP_STEPS)]


def optimizer_of(make: Callable[..., Any], gradients: Tensors) -> Any:
    """An optimizer of weights that have these gradients."""
    weights = [torch.nn.Parameter(gradient.clone()) for gradient in gradients]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    return make(weights, lr=1e-6)


def newton_schulz(gradients: Tensors, dtype: torch.dtype) -> None:
    """Muon's orthogonalization of each matrix."""
    a, b, c = QUINTIC
    for gradient in gradients:
        x = (gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T).to(dtype)
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
