"""Optimizers that a comparison trains with, each given the parameters of a model by name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from spectral_ds.cli.errors import UserError
from spectral_ds.graph.roles import is_numbered

Parameters = Mapping[str, torch.nn.Parameter]


def optimizers_of(
    name: str, parameters: Parameters, learning_rate: float, options: Mapping[str, Any]
) -> list[Optimizer]:
    """The optimizers that together train all parameters, without weight decay.

    Args:
        name: of `settings.OptimizerName`.
        options: of it, by keyword.

    Raises:
        UserError: this torch lacks it.
    """
    hidden = {n: p for n, p in parameters.items() if p.ndim == 2 and is_numbered(n)}
    others = [p for n, p in parameters.items() if n not in hidden]
    matrices = list(hidden.values())
    rates: dict[str, Any] = {"lr": learning_rate, "weight_decay": 0.0}
    plain = {**rates, "fused": True}
    if name == "projection_decay":
        return [ProjectionDecay(list(parameters.values()), **plain, **options)]
    if name == "half_whitened":
        return [HalfWhitened(matrices, **plain, **options), AdamW(others, **plain)]
    if name == "muon":
        muon: Any = getattr(torch.optim, "Muon", None)
        if muon is None:
            raise UserError(f"optimizer = muon: torch {torch.__version__} lacks torch.optim.Muon")
        # Steps as long as AdamW's, so that one grid of learning rates serves both.
        settings = {"adjust_lr_fn": "match_rms_adamw", **rates, **options}
        return [muon(matrices, **settings), AdamW(others, **plain)]
    return [AdamW(list(parameters.values()), **plain, **options)]


class ProjectionDecay(AdamW):
    """AdamW with selective projection decay (arXiv 2411.01713, algorithm 1).

    Where a step leads a tensor further from its start θ₀, though the gradient speaks against it,
    g · (θ − θ₀) > 0, it is pulled back: θ − s·r·(θ − θ₀), r the share by which its distance grew.

    Args:
        strength: s; with 1 the distance stays as it was.
    """

    def __init__(self, params: Any, *, strength: float = 1.0, **settings: Any) -> None:
        super().__init__(params, **settings)
        self._strength = strength
        held = [p for group in self.param_groups for p in group["params"]]
        self._start = {p: p.detach().clone() for p in held}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "the loss is known"
        before = {
            p: (p - start).norm()
            for p, start in self._start.items()
            if p.grad is not None and float((p.grad * (p - start)).sum()) > 0
        }
        super().step()
        for p, distance in before.items():
            change = p - self._start[p]
            now = change.norm()
            ratio = ((now - distance) / now.clamp_min(1e-12)).clamp(0, 1)
            p.sub_(change * (self._strength * ratio))


class HalfWhitened(AdamW):
    """AdamW whose updates UΣVᵀ become UΣ^½Vᵀ, at equal norm; for matrices."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "the loss is known"
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.clone() for p in held]
        super().step()
        for p, start in zip(held, before, strict=True):
            p.copy_(start + half_whitened(p - start))


def half_whitened(update: Tensor) -> Tensor:
    """UΣ^½Vᵀ of UΣVᵀ, with the norm that it had; (rows, columns), in float64 within."""
    wide = update if update.shape[0] <= update.shape[1] else update.T
    work = wide.double()
    values, vectors = torch.linalg.eigh(work @ work.T)  # Σ², U
    # (XXᵀ)^(-1/4) X; what has no energy stays as it is.
    gains = values.clamp_min(0).pow(-0.25)
    gains[values <= values[-1] * 1e-12] = 0
    whitened = (vectors * gains) @ (vectors.T @ work)
    norm = whitened.norm()
    whitened *= work.norm() / norm if norm > 0 else 1
    found: Tensor = whitened.to(update.dtype)
    return found if update.shape[0] <= update.shape[1] else found.T
