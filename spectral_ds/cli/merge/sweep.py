"""Sweep: settings of the merge judged on the user's own texts, beside plain interpolation.

All models are in memory; no merged weights are written.
"""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path

from torch import nn

from spectral_ds.cli.merge.in_memory import InMemory
from spectral_ds.cli.merge.judges import Judge
from spectral_ds.cli.merge.statistics import Functions, Graphs
from spectral_ds.console import progress
from spectral_ds.files import write_whole

MUS = (0.3, 1.0, 3.0)
RESTS = (0.6, 1.0)
SCALES = (1.0, 0.8)
# Of plain interpolation; 0 is the base model, with the head of the tuned one.
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
INTERPOLATION, FILTERED = "interpolation", "filtered"


@dataclass(frozen=True)
class Setting:
    """A setting and what it gives.

    Attributes:
        method: INTERPOLATION, W₀ + α · mean of ΔW; or FILTERED, by μ and rest, all times a scale.
        task, accuracy, general, forgetting: see `judges.Judgement`.
        gain: how much less it forgets than interpolation at an equal loss on the task.
    """

    method: str
    alpha: float | None
    mu: float | None
    rest: float | None
    scale: float | None
    task: float
    accuracy: float | None
    general: float
    forgetting: float
    gain: float | None = None

    @property
    def name(self) -> str:
        if self.method == INTERPOLATION:
            return f"α = {self.alpha:g}"
        return f"μ = {self.mu:g}, {self.kind}"

    @property
    def kind(self) -> str:
        """What filtered settings of all μ have in common."""
        return f"rest = {self.rest:g}" + ("" if self.scale == 1 else f", scale = {self.scale:g}")


def sweep(
    base: nn.Module,
    tuned: Sequence[nn.Module],
    target: nn.Module,
    keep: Graphs,
    learn: Sequence[Graphs | None],
    judge: Judge,
    mus: Sequence[float],
    rests: Sequence[float],
    scales: Sequence[float],
) -> list[Setting]:
    """Judge all settings.

    Args:
        target: of the first tuned model's class; its weights are overwritten.
    """
    models = InMemory(base, tuned, target)
    found = []
    count = len(ALPHAS) + len(mus) * len(scales) * len(rests)
    with progress("sweep", count, "setting", True) as update:
        for alpha in ALPHAS:
            models.write(models.names, None, alpha)
            judged = judge(target)
            found.append(Setting(INTERPOLATION, alpha, None, None, None, **asdict(judged)))
            update(1)
        for mu, scale in product(mus, scales):
            functions = Functions(keep, learn, mu, scale)
            for rest in rests:
                models.write(models.names, functions, rest * scale)
                judged = judge(target)
                found.append(Setting(FILTERED, None, mu, rest, scale, **asdict(judged)))
                update(1)
    return with_gains(found)


def with_gains(settings: Sequence[Setting]) -> list[Setting]:
    """Settings with what they forget less than interpolation at an equal loss on the task.

    Interpolations are joined by straight lines; of those with the same loss, the one that forgets
    least counts. Where a setting's loss is below what any reaches, it is held against the one with
    the lowest loss; where it is above all, against the base model.
    """
    line = [s for s in settings if s.method == INTERPOLATION]
    found = []
    for setting in settings:
        if setting.method == INTERPOLATION:
            found.append(setting)
            continue
        values = asdict(setting) | {"gain": _of_line(line, setting.task) - setting.forgetting}
        found.append(Setting(**values))
    return found


def _of_line(line: Sequence[Setting], loss: float) -> float:
    """What interpolation forgets at a loss on the task."""
    there = [
        a.forgetting + (loss - a.task) / (b.task - a.task) * (b.forgetting - a.forgetting)
        for a, b in pairwise(line)
        if min(a.task, b.task) <= loss <= max(a.task, b.task) and a.task != b.task
    ]
    if there:
        return min(there)
    order = sorted(line, key=lambda each: each.task)
    return order[0].forgetting if loss < order[0].task else order[-1].forgetting


def recommended(settings: Sequence[Setting]) -> Setting | None:
    """Of filtered settings that forget no more than interpolation, that of the least task loss."""
    good = [s for s in settings if s.gain is not None and s.gain >= 0]
    return min(good, key=lambda each: each.task, default=None)


def write_table(settings: Sequence[Setting], path: Path) -> None:
    """Write all settings as CSV; empty where a column does not apply."""

    def write(unfinished: Path) -> None:
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            rows = [asdict(each) for each in settings]
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path, write)
