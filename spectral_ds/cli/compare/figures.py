"""Figures of a comparison: frontiers with bands, learning curves, what few examples reach."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spectral_ds.cli.compare.inference import GRID, Frontier
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
# Area of a setting's dot, in points².
SETTING = 16
# Of a band: standard errors of the mean over seeds.
ERRORS = 1.0


def draw(
    analyses: Sequence[TaskAnalysis],
    examples: Mapping[str, int],
    what: Mapping[str, str],
    out: Path,
) -> list[Path]:
    """Write all figures; their paths.

    Args:
        examples: of each task that has few, to train on.
        what: each axis is.
    """
    written = []
    for analysis in analyses:
        for name, figure in (
            (frontier_file(analysis), frontiers(analysis, what[analysis.axis])),
            (curves_file(analysis), curves(analysis)),
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
def frontiers(analysis: TaskAnalysis, what: str) -> "Figure":
    """Loss on the task against what is forgotten; lower and further left is better.

    Frontiers are chosen on validation data; small dots are settings, not interpolated, of
    methods that have several.
    """
    figure = _figure(len(analysis.frontiers))
    axes = figure.subplots()
    for number, (name, found) in enumerate(analysis.frontiers.items()):
        if not found:
            continue
        grid = _grid(found)
        if grid is None:
            _point(axes, found, name, number)
        else:
            losses = np.array([frontier.at(grid) for frontier in found])
            _band(axes, grid, losses, name, number)
    _dots(axes, analysis)
    axes.set_xlabel(what)
    axes.set_ylabel("loss on the task, test data (nats)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(f"Task against forgetting: {analysis.task}", x=0.01, ha="left")
    return figure


def _figure(names: int) -> "Figure":
    """As high as a legend of so many names."""
    return new_figure(max(HEIGHT, LINE * names + MARGIN), WIDE)


def _grid(found: Sequence[Frontier]) -> Any:
    """Between the points that all seeds have; None where there is nothing between them."""
    ends = [frontier.ends for frontier in found]
    low, high = max(low for low, _ in ends), min(high for _, high in ends)
    return np.linspace(low, high, GRID) if low < high else None


def _point(axes: Any, found: Sequence[Frontier], name: str, number: int) -> None:
    """The mean over seeds of where each begins to forget, with standard errors."""
    x = np.array([frontier.ends[0] for frontier in found])
    places = np.array([x, [float(f.at(at)) for f, at in zip(found, x, strict=True)]])
    errors = _errors(places.T)
    color, marker = _look(number)["color"], MARKERS[number // len(COLORS) % len(MARKERS)]
    axes.errorbar(
        *places.mean(1), xerr=errors[0], yerr=errors[1], label=name, color=color, marker=marker,
        linestyle="none", elinewidth=1.2, capsize=3,
    )  # fmt: skip


def _dots(axes: Any, analysis: TaskAnalysis) -> None:
    """A dot for each setting of methods that have several, where there is room for it."""
    limits = axes.axis()
    for number, name in enumerate(analysis.frontiers):
        if len(settings := analysis.settings[name]) > 1:
            axes.scatter(*zip(*settings, strict=True), s=SETTING, color=_look(number)["color"])
    axes.axis(limits)


def _errors(seeds: Any) -> Any:
    """Standard errors of the mean over seeds, (seeds, ...); 0 of one."""
    if len(seeds) < 2:
        return np.zeros(seeds.shape[1:])
    return ERRORS * seeds.std(0, ddof=1) / len(seeds) ** 0.5


@styled
def curves(analysis: TaskAnalysis) -> "Figure":
    """Validation loss while training, each method at its best learning rate."""
    figure = _figure(len(analysis.curves))
    axes = figure.subplots()
    for number, (name, curve) in enumerate(analysis.curves.items()):
        if curve:
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
