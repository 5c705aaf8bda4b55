"""The figure of activity that `spectral-ds inspect` draws."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from spectral_ds.cli.inspect.activity import ActivityReport
from spectral_ds.console.figure_style import COLORS, GREY, WIDE, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches of a panel.
HEIGHT = 4.2
STYLES = ("-", "--")
MOST_LINES = len(STYLES) * len(COLORS)


@styled
def activity_figure(reports: Sequence[ActivityReport]) -> "Figure":
    """How active directions are, a panel for each source of inputs; the gradient along them."""
    measured = [report for report in reports if report.gradient is not None]
    panels = len(reports) + bool(measured)
    figure = new_figure(0.6 + HEIGHT * panels, WIDE)
    figure.suptitle("Activity of the inputs of layers", x=0.01, ha="left")
    grid = figure.subplots(panels, squeeze=False)[:, 0]
    for axes, report in zip(grid, reports, strict=False):
        _spectra(axes, report)
    if measured:
        _shares(grid[-1], measured)
    return figure


def _spectra(axes: "Axes", report: ActivityReport) -> None:
    for number, role in enumerate(report.roles[:MOST_LINES]):
        values = np.array(role.eigenvalues)
        axes.plot(
            np.arange(1, len(values) + 1), np.where(values > 0, values, np.nan), lw=1.5,
            color=COLORS[number % len(COLORS)], ls=STYLES[number // len(COLORS) % len(STYLES)],
            label=f"{role.roles[0]}{_more(role.roles)}",
        )  # fmt: skip
    axes.axhline(1, color=GREY, lw=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    hidden = len(report.roles) - MOST_LINES
    axes.set_title(report.name + (f" ({hidden} more roles are not shown)" if hidden > 0 else ""))
    axes.set_xlabel("directions of the inputs (1: the most active)")
    axes.set_ylabel("activity (mean of all: 1)")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _more(roles: Sequence[str]) -> str:
    return f" and {len(roles) - 1} more" if len(roles) > 1 else ""


def _shares(axes: "Axes", reports: Sequence[ActivityReport]) -> None:
    """Of the gradient, what goes along the most active directions of each source."""
    directions = reports[0].directions
    at, width = np.arange(len(directions)), 0.8 / (len(reports) + 1)
    bars = {report.name: report.gradient for report in reports}
    bars["by chance"] = reports[0].by_chance
    for number, (name, shares) in enumerate(bars.items()):
        color = GREY if name == "by chance" else COLORS[number % len(COLORS)]
        heights = 100 * np.array(shares)
        axes.bar(at + number * width, heights, width, align="edge", color=color, label=name)
    axes.set_xticks(at + 0.4, [str(k) for k in directions])
    axes.set_title("The gradient of the data along active directions")
    axes.set_xlabel("the most active directions of each layer")
    axes.set_ylabel("% of its energy")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
