"""Inference: what differences between methods are worth.

Runs of two methods with the same seed share their examples, their order and the new head, so their
differences are paired. Everything here is exact arithmetic on few numbers.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats

Values: TypeAlias = npt.NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 9999
BOOTSTRAP_SEED = 0
# Where frontiers are held against each other, between the ends that both have.
GRID = 101


@dataclass(frozen=True)
class Difference:
    """Of paired runs.

    Attributes:
        mean: over pairs.
        low, high: of its 95 % bootstrap interval (bias-corrected and accelerated; Efron 1987); NaN
            for fewer than three pairs.
        p: two-sided, of Student's t test of paired samples; NaN for fewer than two pairs.
        pairs: how many.
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int


def paired(differences: Sequence[float]) -> Difference:
    """What is known of the mean of paired differences."""
    values = np.asarray(differences, np.float64)
    nothing = float("nan")
    if len(values) < 2:
        return Difference(float(values.mean()), nothing, nothing, nothing, len(values))
    if np.ptp(values) == 0:  # as a control that must be equal
        p = 1.0 if values[0] == 0 else 0.0
        return Difference(float(values[0]), float(values[0]), float(values[0]), p, len(values))
    p = float(stats.ttest_1samp(values, 0.0).pvalue)
    if len(values) < 3:
        return Difference(float(values.mean()), nothing, nothing, p, len(values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            (values,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, method="BCa",
            rng=np.random.default_rng(BOOTSTRAP_SEED),
        ).confidence_interval  # fmt: skip
    return Difference(
        float(values.mean()), float(interval.low), float(interval.high), p, len(values)
    )


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for being several (Holm 1979); NaN stays, and does not count."""
    known = [at for at, p in enumerate(ps) if not np.isnan(p)]
    found, largest = [float("nan")] * len(ps), 0.0
    for rank, at in enumerate(sorted(known, key=lambda at: ps[at])):
        largest = max(largest, min(1.0, (len(known) - rank) * ps[at]))
        found[at] = largest
    return found


class Frontier:
    """The least loss at a forgetting of at most f, of points (forgetting, loss).

    Between neighbouring points it is a straight line, as weights can be interpolated. Where all
    points forget more, it is the loss of the one that forgets least; so what forgets less than any
    of them is held against something that had it easier.
    """

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        order = sorted(points)
        self._forgetting = np.array([f for f, _ in order])
        self._loss = np.minimum.accumulate(np.array([loss for _, loss in order]))

    @property
    def ends(self) -> tuple[float, float]:
        """Of what its points forget."""
        return float(self._forgetting[0]), float(self._forgetting[-1])

    def at(self, forgetting: float | Values) -> Values:
        return np.asarray(np.interp(forgetting, self._forgetting, self._loss))


def on_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other one beats in both forgetting and loss."""
    found, least = [], float("inf")
    for at in sorted(range(len(points)), key=lambda at: points[at]):
        if points[at][1] < least:
            least = points[at][1]
            found.append(at)
    return found


def between(one: Sequence[Frontier], other: Sequence[Frontier]) -> list[float]:
    """Mean height of `one` over `other`, pair by pair, where all of them have points.

    Empty where no range of forgetting is common to all.
    """
    ends = [frontier.ends for frontier in (*one, *other)]
    low, high = max(low for low, _ in ends), min(high for _, high in ends)
    if low >= high:
        return []
    grid = np.linspace(low, high, GRID)
    return [float((a.at(grid) - b.at(grid)).mean()) for a, b in zip(one, other, strict=True)]
