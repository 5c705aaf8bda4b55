"""The figure of a sweep: loss on the task against what is forgotten, a point a setting."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spectral_ds.cli.merge.sweep import FILTERED, INTERPOLATION, Setting
from spectral_ds.console.figure_style import BLUE, COLORS, GREY, RED, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINE_LENGTH = 40  # characters beside the vertical axis
# Where a line's points have their numbers: those of lines that lie close stay apart.
CORNERS = ((10, -12), (10, 5), (-10, -12), (-10, 5))


@styled
def frontier(settings: Sequence[Setting], best: Setting | None, forgetting: str) -> "Figure":
    """Lower and further left is better.

    Args:
        best: that is recommended.
        forgetting: what the vertical axis is.
    """
    figure = new_figure(5.4)
    axes = figure.subplots()
    line = [each for each in settings if each.method == INTERPOLATION]
    axes.plot(
        [s.task for s in line], [s.forgetting for s in line], color=GREY, marker="o", markersize=5,
        label="interpolation, at α",
    )  # fmt: skip
    for each in line:
        axes.annotate(
            f"{each.alpha:g}", (each.task, each.forgetting), textcoords="offset points",
            xytext=(6, 4), color=GREY, fontsize="small",
        )  # fmt: skip
    filtered = [each for each in settings if each.method == FILTERED]
    colors = [BLUE, *COLORS[2:]]
    for index, kind in enumerate(dict.fromkeys(each.kind for each in filtered)):
        those = [each for each in filtered if each.kind == kind]
        color, corner = colors[index % len(colors)], CORNERS[index % len(CORNERS)]
        axes.plot(
            [s.task for s in those], [s.forgetting for s in those], marker="s", markersize=6,
            color=color, linewidth=1, label=f"filtered, {kind}, at μ",
        )  # fmt: skip
        for each in those:
            axes.annotate(
                f"{each.mu:g}", (each.task, each.forgetting), textcoords="offset points",
                xytext=corner, ha="center", color=color, fontsize="small",
            )  # fmt: skip
    if best is not None:
        axes.plot(
            best.task, best.forgetting, "o", markersize=16, markerfacecolor="none", color=RED,
            label=f"recommended: {best.name}",
        )  # fmt: skip
    axes.set_xlabel("loss on the task (nats)")
    axes.set_ylabel(textwrap.fill(forgetting, LINE_LENGTH))
    axes.legend()
    figure.suptitle("Task against forgetting", x=0.01, ha="left")
    return figure
