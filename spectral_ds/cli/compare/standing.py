"""Standing: what is said of a method on a task; `analysis` finds it from rows of results."""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from spectral_ds.cli.compare.inference import Difference

# (what is forgotten, loss).
Place: TypeAlias = tuple[float, float]


class Point(NamedTuple):
    """A setting of a method, whose rows are those of the seeds."""

    learning_rate: float
    setting: str
    alpha: float

    def __str__(self) -> str:
        alpha = "" if self.alpha == 1 else f"α={self.alpha:g}"
        return " ".join(filter(None, (self.setting, alpha, f"at {self.learning_rate:g}")))


@dataclass(frozen=True)
class Best:
    """A method where its validation loss is least, not interpolated.

    Attributes:
        point: that was chosen.
        loss, accuracy, forgetting: on test data, means over seeds.
        loss_difference: to the baseline at its best; negative is better.
        accuracy_difference: likewise; positive is better. None without accuracy.
        p: of the loss's difference, corrected.
    """

    point: Point
    loss: float
    accuracy: float | None
    forgetting: float
    loss_difference: Difference
    accuracy_difference: Difference | None
    p: float


@dataclass(frozen=True)
class Equal:
    """A method against the baseline and its interpolations at equal forgetting.

    Attributes:
        point: where its validation loss is most below the baseline's frontier.
        loss, forgetting: there, on test data, means over seeds.
        difference: of its loss to the frontier's; negative is better.
        p: of it, corrected.
        area: mean difference of the two frontiers; None where they have no range in common.
        area_p: of it, corrected.
    """

    point: Point
    loss: float
    forgetting: float
    difference: Difference
    p: float
    area: Difference | None
    area_p: float


@dataclass(frozen=True)
class Cost:
    """What a method costs at its best.

    Attributes:
        step: seconds of a step over the baseline's in the same process pool, means over seeds.
        memory: bytes of training over the baseline's; None where that cannot be told.
        perturbation: ‖W − W₀‖, mean over seeds.
        steps_to: to the validation loss that the baseline ends with at its best, by the same seed;
            mean over seeds that reach it.
        seconds_to: likewise, of training.
        reached: how many do; None where no curve of the baseline is known.
    """

    step: float
    memory: float | None
    perturbation: float
    steps_to: float | None
    seconds_to: float | None
    reached: int | None


@dataclass(frozen=True)
class Standing:
    """What is to be said of a method on a task."""

    method: str
    seeds: int
    best: Best
    equal: Equal
    cost: Cost


@dataclass(frozen=True)
class TaskAnalysis:
    """All methods on a task, the baseline first.

    Attributes:
        axis: what counts as forgetting.
        standings: of methods that have rows of at least one seed of the baseline's.
        fronts: by method: of each point that validation data put on its frontier, and each seed,
            (what is forgotten, loss) on test data.
        curves: by method, at its best learning rate: (step, validation losses of the seeds).
    """

    task: str
    axis: str
    standings: list[Standing]
    fronts: dict[str, list[list[Place]]]
    curves: dict[str, list[tuple[int, list[float]]]]
