"""Running mean of a gradient's sketches over steps."""

from collections.abc import Mapping, Sequence

import torch

from spectral_ds.laplacian.sketches import Sketches


class RunningSketch:
    """Running mean of sketches; samples that are not finite are left out.

    Args:
        sketches: how sketches are taken.
        decay: of the mean, which forgets older samples by this factor a sample.

    Attributes:
        mean: of the partial sketches, flat.
        samples: taken so far.
        kept: (), float64: those of them that were finite.
        concentration: (), float64: ρ = Σ w_t² of the weights w_t, which sum to 1.
    """

    def __init__(self, sketches: Sketches, decay: float) -> None:
        self.sketches = sketches
        self._decay = decay
        self.mean = sketches.empty()
        self._columns = torch.tensor(list(sketches.columns.values()), dtype=torch.float64)
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget all samples."""
        self.mean.zero_()
        self.samples = 0
        self.kept = torch.zeros((), dtype=torch.float64, device=self.mean.device)
        self.concentration = torch.zeros_like(self.kept)

    def take(self, gradients: Sequence[torch.Tensor | None], scale: float) -> torch.Tensor:
        """Partial sketches of a sample, valid until the next is taken; no communication.

        Args:
            gradients: this rank's fragments, flat; None counts as zeros.
            scale: by which they are multiplied (loss scaling).
        """
        return self.sketches.take(gradients).div_(scale)

    def add(self, sketch: torch.Tensor, is_finite: torch.Tensor) -> None:
        """Add a sample to the mean; no communication.

        Args:
            sketch: from `take`; changed.
            is_finite: (), bool: whether the gradient is, on all ranks.
        """
        self.samples += 1
        self.kept = self.kept + is_finite
        weight = weight_of_newest(self.kept, self._decay) * is_finite
        self.concentration = (1 - weight).square() * self.concentration + weight.square()
        self.mean.add_(sketch.sub_(self.mean).nan_to_num_(0, 0, 0).mul_(weight))

    def numbers(self) -> dict[str, torch.Tensor]:
        """All of its state but the mean, equal on all ranks."""
        return {
            "samples": torch.tensor([self.samples], dtype=torch.float64),
            "weights": torch.stack((self.kept, self.concentration)),
            "columns": self._columns.clone(),
        }

    def complete(self) -> Sequence[torch.Tensor]:
        """Complete sketches of the mean, as `sketches.layout` has them (collective)."""
        return self.sketches.complete(self.mean)

    def fits(self, numbers: Mapping[str, torch.Tensor]) -> bool:
        """Whether a state is of sketches like these; not so if there is none."""
        columns = numbers.get("columns")
        return columns is not None and torch.equal(columns.cpu(), self._columns)

    def restore(
        self, numbers: Mapping[str, torch.Tensor], complete: Sequence[torch.Tensor]
    ) -> None:
        """Go on from a state that fits; no communication.

        Args:
            numbers: from `numbers`.
            complete: this rank's part of the complete sketches.
        """
        self.samples = int(numbers["samples"].item())
        weights = numbers["weights"].to(self.mean.device, torch.float64)
        self.kept, self.concentration = weights.unbind()
        self.mean.copy_(self.sketches.partial(complete))


def weight_of_newest(count: torch.Tensor, decay: float) -> torch.Tensor:
    """Weight of the newest of so many samples in a running mean."""
    return (1 - decay) / (1 - decay ** count.clamp_min(1))
