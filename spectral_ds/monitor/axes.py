"""Axes: what figures have in common: their ticks and labels, and how values become visible."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from spectral_ds.console.figure_style import BLANK, GREY, HEAT_MAP, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

Values = npt.NDArray[np.float64]

LINE_LENGTH = 110  # characters of a note's line
# Numbers that span more than this factor are coloured by their logarithm.
WIDE_RANGE = 20.0


def new_axes(title: str, height: float = 4.2) -> "tuple[Figure, Axes]":
    """A figure of one pair of axes."""
    figure = new_figure(height)
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def divide(figure: "Figure", axes: "Axes", heights: Sequence[float]) -> "Axes":
    """Put axes of the same frequencies under those of a figure."""
    grid = figure.add_gridspec(2, 1, height_ratios=heights)
    axes.set_subplotspec(grid[0])
    axes.tick_params(labelbottom=False)
    return figure.add_subplot(grid[1], sharex=axes)


def mesh_of(
    axes: "Axes", x: Values, y: Values, values: Values, norm: "LogNorm | None" = None
) -> "QuadMesh":
    """A heat map of (rows, columns) between edges `y` and `x`."""
    shown = np.ma.masked_invalid(values)
    axes.set_facecolor(BLANK)
    if norm is not None:
        return axes.pcolormesh(x, y, shown, cmap=HEAT_MAP, norm=norm)
    highest = float(shown.max()) if shown.count() else 0.0
    return axes.pcolormesh(x, y, shown, cmap=HEAT_MAP, vmin=0, vmax=highest or 1.0)


def wide_norm(values: Values) -> "LogNorm | None":
    """Colours by logarithm, where numbers span a wide range; zeros get the lowest."""
    from matplotlib.colors import LogNorm

    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size or positive.max() < WIDE_RANGE * positive.min():
        return None
    return LogNorm(positive.min(), positive.max(), clip=True)


def as_shares(axis: "Axis", label: str) -> None:
    """An axis of shares, in percent."""
    from matplotlib.ticker import FuncFormatter

    axis.set_label_text(label)
    few_ticks(axis)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))


def few_ticks(axis: "Axis", norm: "LogNorm | None" = None, integer: bool = False) -> None:
    """About five round numbers, each written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    steps = [1, 2, 2.5, 5, 10]
    axis.set_major_locator(MaxNLocator(5, steps=steps, integer=integer, min_n_ticks=1))
    if norm is not None and norm.vmin is not None and norm.vmax is not None:
        is_short = norm.vmax < 100 * norm.vmin
        axis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0) if is_short else (1.0,), numticks=6))
        axis.set_minor_locator(NullLocator())
    form = ".0f" if integer else ".3g"
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:{form}}"))


def in_decades(axes: "Axes", label: str, *values: Values) -> None:
    """A logarithmic axis of whole decades around the values."""
    from matplotlib.ticker import LogLocator, NullLocator

    found = np.concatenate(values)
    found = np.clip(found[np.isfinite(found)], 1e-300, 1e300)
    low, high = (0.0, 0.0)
    if found.size:
        low, high = np.floor(np.log10(found.min())), np.ceil(np.log10(found.max()))
    axes.set_yscale("log")
    axes.set_ylim(10.0**low, 10.0 ** max(high, low + 1))
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel(label)


def as_names(axis: "Axis", names: Sequence[str], most: int) -> None:
    """A tick for every name, or for every second, fifth, tenth and so on if there are too many."""
    strides = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    stride = next(s for s in strides if len(names) <= s * most)
    axis.set_ticks(range(0, len(names), stride), labels=names[::stride])


def beside(axes: "Axes", text: str, height: float) -> None:
    """A word to the right of the axes."""
    axes.annotate(
        text, (1, height), (4, 0), xycoords=axes.get_yaxis_transform(), color=GREY,
        textcoords="offset points", va="center", fontsize="small",
    )  # fmt: skip


def legend_above(axes: "Axes", labels: Sequence[str]) -> None:
    """What is drawn, in order, to the right of the title."""
    handles = axes.containers or axes.patches
    axes.legend(
        handles, labels, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(labels),
        borderaxespad=0, columnspacing=1.2,
    )  # fmt: skip


def note(
    figure: "Figure", *values: Values, blank: str = "blank: not finite", also: str = ""
) -> None:
    """What a reader must know, at the foot of the figure: what is blank, if anything is."""
    has_blank = any(not np.isfinite(each).all() for each in values)
    lines = textwrap.wrap(also, LINE_LENGTH) + [blank] * has_blank
    if lines:
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize="small", color=GREY)


def around(places: Values) -> Values:
    """Edges of cells around ascending places."""
    gaps = np.diff(places) if len(places) > 1 else np.ones(1)
    return np.concatenate(
        (places[:1] - gaps[:1] / 2, places[:-1] + gaps / 2, places[-1:] + gaps[-1:] / 2)
    )


def finite(values: Values) -> Values:
    """Values, NaN in place of what is not finite."""
    return np.asarray(np.where(np.isfinite(values), values, np.nan))


def positive(values: Values) -> Values:
    """Values, NaN in place of what is not finite and above zero."""
    return np.asarray(np.where(np.isfinite(values) & (values > 0), values, np.nan))


def limits(*values: Values) -> tuple[float, float]:
    """Limits of an axis that shows 0 and all values."""
    found = np.concatenate(values)
    found = found[np.isfinite(found)]
    low, high = min([0.0, *found]), max([0.0, *found])
    margin = 0.06 * (high - low) or 1.0
    return low - margin * (low < 0), high + margin


def last_of_each(steps: Values, values: Values) -> tuple[Values, Values]:
    """Ascending steps, and of each the last values; (T,) and (T, ...)."""
    steps, last = np.unique(steps[::-1], return_index=True)
    return steps, values[::-1][last]
