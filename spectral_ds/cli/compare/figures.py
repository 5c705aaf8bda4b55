"""Figures of a comparison: frontiers with errors, learning curves, what few examples reach."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectral_ds.cli.compare.material import FORGETTING
from spectral_ds.cli.compare.standing import Best, TaskAnalysis
from spectral_ds.console.figure_style import COLORS, GREY, WIDE, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT = 5.4
# Inches of a line of the legend, and of what is above and below it.
LINE, MARGIN = 0.26, 0.8
# Of points of one colour.
MARKERS = ("o", "s", "^", "D")
# Area of a point of a method without a name, in points².
OTHER = 14
PALE = "#BDBDBD"
# Of a band or bar: standard errors of the mean over seeds.
ERRORS = 1.0


def draw(
    analyses: Sequence[TaskAnalysis],
    drawn: Sequence[str],
    examples: Mapping[str, int],
    what: Mapping[str, str],
    out: Path,
) -> list[Path]:
    """Write all figures; their paths.

    Args:
        drawn: methods that figures name; all without any.
        examples: of each task that has few, to train on.
        what: each axis is.
    """
    written = []
    for analysis in analyses:
        for name, figure in (
            (frontier_file(analysis), frontiers(analysis, what[analysis.axis], drawn)),
            (curves_file(analysis), curves(analysis, drawn)),
        ):
            figure.savefig(out / name)
            written.append(out / name)
    few = [each for each in analyses if each.task in examples and each.axis == FORGETTING]
    if len({examples[each.task] for each in few}) > 1:
        by_examples(few, examples).savefig(out / "examples.png")
        written.append(out / "examples.png")
    return written


def frontier_file(analysis: TaskAnalysis) -> str:
    """The name of its figure."""
    return f"frontier-{analysis.axis}-{analysis.task}.png"


def curves_file(analysis: TaskAnalysis) -> str:
    """The name of that of its curves."""
    return f"curves-{analysis.task}.png"


@styled
def frontiers(analysis: TaskAnalysis, what: str, drawn: Sequence[str] = ()) -> "Figure":
    """Loss on the task against what is forgotten; lower and further left is better.

    Args:
        drawn: methods with a name, besides the baseline; the points of others are grey.
    """
    names, others = _split(analysis.fronts, drawn)
    figure = _figure(len(names) + bool(others))
    axes = figure.subplots()
    for number, name in enumerate(names):
        if front := analysis.fronts[name]:
            _front(axes, np.array(front), name, number)
    if points := [seeds for name in others for seeds in analysis.fronts[name]]:
        x, y = np.array([np.mean(seeds, 0) for seeds in points]).T
        axes.scatter(x, y, s=OTHER, color=PALE, label="other methods", zorder=0)
    axes.set_xlabel(what)
    axes.set_ylabel("loss on the task, test data (nats)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(f"Task against forgetting: {analysis.task}", x=0.01, ha="left")
    return figure


def _split(found: Mapping[str, Any], drawn: Sequence[str]) -> tuple[list[str], list[str]]:
    """Methods with a name in a figure, the baseline first; and the others."""
    baseline = next(iter(found))
    named = [name for name in drawn or found if name in found and name != baseline]
    return [baseline, *named], [name for name in found if name not in (baseline, *named)]


def _figure(names: int) -> "Figure":
    """As high as a legend of so many names."""
    return new_figure(max(HEIGHT, LINE * names + MARGIN), WIDE)


def _front(axes: Any, points: Any, name: str, number: int) -> None:
    """Means over seeds with standard errors, joined by lines.

    Args:
        points: (points, seeds, 2).
    """
    order = np.argsort(points[..., 0].mean(1))
    seeds = points[order].swapaxes(0, 1)
    (x, y), errors = seeds.mean(0).T, _errors(seeds).T
    look, marker = _look(number), MARKERS[number // len(COLORS) % len(MARKERS)]
    axes.plot(x, y, label=name, marker=marker, markersize=4.5, **look)
    axes.errorbar(
        x, y, xerr=errors[0], yerr=errors[1], ecolor=look["color"], fmt="none", elinewidth=1,
        alpha=0.5,
    )  # fmt: skip


def _errors(seeds: Any) -> Any:
    """Standard errors of the mean over seeds, (seeds, ...); 0 of one."""
    if len(seeds) < 2:
        return np.zeros(seeds.shape[1:])
    return ERRORS * seeds.std(0, ddof=1) / len(seeds) ** 0.5


@styled
def curves(analysis: TaskAnalysis, drawn: Sequence[str] = ()) -> "Figure":
    """Validation loss while training, each method at its best learning rate.

    Args:
        drawn: methods that are, besides the baseline; all without any.
    """
    names, _ = _split(analysis.curves, drawn)
    figure = _figure(sum(bool(analysis.curves[name]) for name in names))
    axes = figure.subplots()
    for number, name in enumerate(names):
        if curve := analysis.curves[name]:
            steps = np.array([step for step, _ in curve])
            seeds = min(len(losses) for _, losses in curve)
            losses = np.array([losses[:seeds] for _, losses in curve]).T
            _band(axes, steps, losses, name, number, marker="o")
    axes.set_xlabel("step")
    axes.set_ylabel("loss on the task, validation data (nats)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(f"Learning: {analysis.task}", x=0.01, ha="left")
    return figure


@styled
def by_examples(analyses: Sequence[TaskAnalysis], examples: Mapping[str, int]) -> "Figure":
    """Loss, and accuracy if there is any, at its best against examples, a line a method."""
    places: dict[str, dict[int, Best]] = {}
    for analysis in sorted(analyses, key=lambda each: examples[each.task]):
        for each in analysis.standings:
            places.setdefault(each.method, {})[examples[analysis.task]] = each.best
    panels: list[tuple[str, Callable[[Best], float | None]]] = [
        ("loss on the task, test data (nats)", lambda best: best.loss)
    ]
    if all(best.accuracy is not None for found in places.values() for best in found.values()):
        panels.append(("accuracy, test data", lambda best: best.accuracy))
    figure = _figure(len(places))
    row = figure.subplots(1, len(panels), squeeze=False).flat
    for axes, (label, value) in zip(row, panels, strict=True):
        for number, (name, found) in enumerate(places.items()):
            heights = [value(best) for best in found.values()]
            axes.plot(list(found), heights, marker="o", label=name, **_look(number))
        counts = sorted({count for found in places.values() for count in found})
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("examples, or examples of each class")
        axes.set_ylabel(label)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle("Few examples", x=0.01, ha="left")
    return figure


def _band(axes: Any, x: Any, seeds: Any, name: str, number: int, **more: Any) -> None:
    """The mean over seeds and its standard error."""
    mean, look, error = seeds.mean(0), _look(number), _errors(seeds)
    axes.plot(x, mean, label=name, **look, **more)
    axes.fill_between(x, mean - error, mean + error, alpha=0.15, color=look["color"], linewidth=0)


def _look(number: int) -> dict[str, Any]:
    """Of the method with a number: the baseline is grey."""
    if number == 0:
        return {"color": GREY, "linestyle": "-", "linewidth": 2.5}
    styles = ("-", "--", ":", "-.")
    at = number - 1
    return {"color": COLORS[at % len(COLORS)], "linestyle": styles[at // len(COLORS) % len(styles)]}
