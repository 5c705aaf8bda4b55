"""Running mean of a gradient's sketches over steps, and of what consecutive ones have in common."""

from collections.abc import Callable, Collection

import torch

from spectral_ds.checkpoint import PartState, Pieces, Restoration, SavedState, numbers_below
from spectral_ds.sharding import Signal
from spectral_ds.sketches import Sketches


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
        self._columns = torch.tensor(
            list(sketches.columns.values()), dtype=torch.float64, device="cpu"
        )
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget all samples."""
        self.mean.zero_()
        self.samples = 0
        self.kept = torch.zeros((), dtype=torch.float64, device=self.mean.device)
        self.concentration = torch.zeros_like(self.kept)

    def take(self, gradients: Signal, scale: float) -> torch.Tensor:
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

    def take_over(self, other: "RunningSketch", names: Collection[str]) -> None:
        """Go on with another's mean of these parameters; of others it begins at zero."""
        self.samples, self.kept, self.concentration = other.samples, other.kept, other.concentration
        theirs = other.sketches.parts_of(other.mean)
        for key, rows in self.sketches.parts_of(self.mean).items():
            if key.parameter in names and key in theirs and theirs[key].shape == rows.shape:
                rows.copy_(theirs[key])

    def state(self, name: str) -> PartState:
        """All of it, the mean as complete sketches (collective).

        Args:
            name: of the state.
        """
        numbers = {
            f"{name}.samples": torch.tensor([self.samples], dtype=torch.float64, device="cpu"),
            f"{name}.weights": torch.stack((self.kept, self.concentration)),
            f"{name}.columns": self._columns.clone(),
        }
        mean = list(self.sketches.complete(self.mean))
        return PartState(numbers, {name: Pieces(self.sketches.layout.own, [*mean])})

    def restore(self, name: str, saved: SavedState) -> Restoration | None:
        """See `Part.restore`; None if the state has no sketches like these.

        Args:
            name: of the state.
        """
        numbers = numbers_below(name, saved.numbers)
        columns = numbers.get("columns")
        if columns is None or not torch.equal(columns.cpu(), self._columns):
            return None
        complete = saved.pieces(name, self.sketches.layout.own)

        def put_in_place() -> None:
            self.samples = int(numbers["samples"].item())
            weights = numbers["weights"].to(self.mean.device, torch.float64)
            self.kept, self.concentration = weights.unbind()
            self.mean.copy_(self.sketches.partial(complete))

        return put_in_place


class ConsecutiveSamples:
    """Signal and noise in all, from each sample and the one before it.

    ⟨g_t, g_{t−1}⟩ is on average the signal's power and ½‖g_t − g_{t−1}‖² the noise's, less and plus
    half the square of what the expectation moves between the two; its drift over the window of the
    running means does not count. Neither depends on a graph. A sample that is not finite is in no
    pair.

    Args:
        sketches: how sketches are taken; the last one is kept.
        decay: of the running means, which forget older pairs by this factor a pair.

    Attributes:
        means: (3,), float64, equal on all ranks: pairs so far, power of signal and of noise; both
            unbiased without drift, so that either may come out negative; all 0 before the first.
    """

    def __init__(self, sketches: Sketches, decay: float) -> None:
        self._decay = decay
        self._last = sketches.empty()
        self.means = torch.zeros(3, dtype=torch.float64, device=self._last.device)
        self._last_power = torch.zeros((), dtype=torch.float64, device=self._last.device)
        self._is_last_finite = torch.zeros((), dtype=torch.bool, device=self._last.device)

    def go_on_from(self, means: torch.Tensor) -> None:
        """Go on from a state's `means`; the next sample begins a new pair."""
        self.means = means.to(self.means.device, torch.float64)
        self._is_last_finite = torch.zeros_like(self._is_last_finite)

    def observe(
        self,
        sketch: torch.Tensor,
        power: torch.Tensor,
        is_finite: torch.Tensor,
        power_of: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Take one sample (collective; synchronizes nothing with the host).

        Args:
            sketch: partial, of the sample.
            power: (), float64: ‖g_t‖².
            is_finite: (), bool: whether the sample is, on all ranks.
            power_of: gives ‖X‖² of partial sketches, summed over ranks (collective).
        """
        difference = power_of(self._last.sub_(sketch))
        common = (power + self._last_power - difference) / 2
        pairs = self.means[0] + 1
        found = torch.stack((pairs, common, difference / 2))
        weight = weight_of_newest(pairs, self._decay)
        moved = torch.stack((pairs, *(self.means + weight * (found - self.means))[1:]))
        self.means = torch.where(is_finite & self._is_last_finite, moved, self.means)
        self._last.copy_(sketch)
        self._last_power, self._is_last_finite = power, is_finite


def weight_of_newest(count: torch.Tensor, decay: float) -> torch.Tensor:
    """Weight of the newest of so many samples in a running mean."""
    return (1 - decay) / (1 - decay ** count.clamp_min(1))
