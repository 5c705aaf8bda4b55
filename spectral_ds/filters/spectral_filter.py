"""SpectralFilter: Y = (1 − s) X + s · h(L) X on the fragments of one rank."""

from collections.abc import Sequence

import torch

from spectral_ds.filters.chebyshev import ChebyshevSeries, apply_series
from spectral_ds.laplacian import LaplacianOperator
from spectral_ds.laplacian.workspace import Workspace


class SpectralFilter:
    """Filters gradients bucket by bucket.

    Args:
        operators: one a bucket.
        workspace: scratch memory for them.
        series: the response.
        strength: s in [0, 1].
        warmup_steps: s rises linearly over this many steps, from s/warmup_steps.
        interval: only steps that are multiples of this are filtered.
    """

    def __init__(
        self,
        operators: Sequence[LaplacianOperator],
        workspace: Workspace,
        series: ChebyshevSeries,
        *,
        strength: float,
        warmup_steps: int,
        interval: int,
    ) -> None:
        self.series = series
        self._operators = operators
        self._workspace = workspace
        self._strength = strength
        self._warmup_steps = warmup_steps
        self._interval = interval

    def strength_at(self, step: int) -> float:
        """s at optimizer step `step` (from 0); 0 on steps that are not filtered."""
        if step % self._interval != 0:
            return 0.0
        return self._strength * min(1.0, (step + 1) / max(self._warmup_steps, 1))

    def hops_at(self, step: int) -> int:
        """Boundary exchanges and multiplies a bucket at this step."""
        return 0 if self._is_identity(self.strength_at(step)) else self.series.order

    def apply(self, gradients: Sequence[torch.Tensor | None], step: int) -> None:
        """Filter in place (collective, one exchange a hop and bucket).

        Args:
            gradients: this rank's fragments, flat, any floating dtype; None is a parameter without
                gradient: it counts as zeros and stays as it is. Arithmetic is float32.
            step: optimizer step, from 0, equal on all ranks.
        """
        strength = self.strength_at(step)
        if self._is_identity(strength):
            return
        coefficients = self.series.blended(strength)
        for operator in self._operators:
            scratch = self._workspace.of(operator)
            operator.block.load(gradients, scratch.x)
            apply_series(operator, coefficients, scratch)
            operator.block.store(scratch.out, gradients)

    def _is_identity(self, strength: float) -> bool:
        return strength == 0 or self.series.coefficients == (1.0,)
