"""Figures: numbers drawn for people, 800 pixels wide.

In: float64 arrays, of which anything that is not finite is left blank, and said. Out: a matplotlib
figure in the style of `console.figure_style`.
"""

import itertools
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from spectral_ds.console.figure_style import (
    BLANK,
    BLUE,
    GREY,
    HEAT_MAP,
    ORANGE,
    RED,
    SKY,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

Values = npt.NDArray[np.float64]

NAME_LENGTH, LINE_LENGTH = 32, 110  # characters of a role and of a note's line
MOST_BLOCKS, MOST_ROLES = 16, 36  # with a label each
# Numbers that span more than this factor are coloured by their logarithm.
WIDE_RANGE = 20.0


@styled
def density_figure(
    share: Values, edges: Values, gains: Values, response: str, strength: float
) -> "Figure":
    """Density of states, and what the filter does to each frequency.

    Args:
        share: (bins,): share of the eigenvalues in each bin.
        edges: (bins + 1,): frequencies λ.
        gains: (bins,): of the filter at the bins' middles.
        response: its name.
        strength: of the filter.
    """
    figure, axes = _new("Density of states and filter")
    edges = edges if edges[-1] > edges[0] else _edges(len(share), 1.0)
    middles = (edges[:-1] + edges[1:]) / 2
    axes.bar(edges[:-1], _finite(share), np.diff(edges), align="edge", color=SKY, edgecolor="white")
    _frequencies(axes.xaxis, edges[-1])
    _shares(axes.yaxis, "share of the eigenvalues")
    over = axes.twinx()
    over.plot(middles, _finite(gains), color=RED, lw=2.5, marker="o" if len(gains) <= 32 else "")
    over.spines["right"].set_visible(True)
    over.tick_params(axis="y", labelcolor=RED)
    over.set_ylabel(f"gain, {response} at strength {strength:.3g}", color=RED)
    _few_ticks(over.yaxis)
    over.set_ylim(_limits(gains))
    axes.set_ylim(0, _limits(share)[1])
    if over.get_ylim()[0] < 0:  # no longer at the height of the bars' zero
        over.axhline(0, color=RED, ls=":")
    _note(figure, share, gains)
    return figure


@styled
def energy_figure(before: Values, after: Values, lambda_max: float) -> "Figure":
    """Shares of the squared norm in equal bands of frequency, before and after the filter."""
    figure, axes = _new("Energy by frequency")
    edges = _edges(len(before), lambda_max)
    width = 0.43 * edges[1]
    middles = (edges[:-1] + edges[1:]) / 2
    axes.bar(middles - width, _finite(before), width, align="edge", color=BLUE)
    axes.bar(middles, _finite(after), width, align="edge", color=ORANGE)
    _frequencies(axes.xaxis, edges[-1])
    _shares(axes.yaxis, "share of the squared norm")
    axes.set_ylim(0, _limits(before, after)[1])
    _legend(axes, ["before the filter", "after"])
    _note(figure, before, after)
    return figure


@styled
def energy_history_figure(steps: Values, energies: Values, lambda_max: float) -> "Figure":
    """Shares of the squared norm by frequency over the run.

    Args:
        steps: (T,): optimizer steps; of one that comes twice, as after a resume, the last counts.
        energies: (T, bands).
        lambda_max: the highest frequency.
    """
    figure, axes = _new("Energy by frequency, over the run")
    steps, last = np.unique(steps[::-1], return_index=True)
    energies = energies[::-1][last]
    edges = _edges(energies.shape[1], lambda_max)
    mesh = _mesh(axes, _around(steps), edges, energies.T)
    axes.set_xlabel("optimizer step")
    _few_ticks(axes.xaxis, integer=True)
    _frequencies(axes.yaxis, edges[-1])
    _shares(figure.colorbar(mesh, pad=0.02).ax.yaxis, "share of the squared norm")
    _note(figure, energies)
    return figure


@styled
def signal_to_noise_figure(signal: Values, noise: Values, lambda_max: float) -> "Figure":
    """Power of signal and noise in equal bands of frequency, and their ratio.

    Both are unbiased estimates; one that is not above zero has no line.
    """
    figure, powers = _new("Signal and noise of the gradient by frequency", 5.2)
    ratios = _divide(figure, powers, (3, 2))
    edges = _edges(len(signal), lambda_max)
    signal, noise = _positive(signal), _positive(noise)
    ratio = signal / noise
    powers.stairs(signal, edges, baseline=None, color=BLUE, lw=2.5)
    powers.stairs(noise, edges, baseline=None, color=RED, lw=2.5, ls=(0, (3, 1)))
    _decades(powers, "power ‖g‖²", signal, noise)
    _legend(powers, ["signal", "noise"])
    ratios.stairs(ratio, edges, baseline=None, color="black", lw=2.5)
    total = np.array([np.nan])
    if np.isfinite(ratio).any():
        total[0] = np.nansum(signal) / np.nansum(noise)
        ratios.axhline(total[0], color=GREY, ls=":")
        _beside(ratios, "total", total[0])
    _decades(ratios, "signal / noise", ratio, total)
    _frequencies(ratios.xaxis, edges[-1])
    _note(figure, signal, noise, blank="no line: the estimate is not above zero")
    return figure


@styled
def gains_figure(gains: Values, lambda_max: float, response: str) -> "Figure":
    """The gain of each of equal bands of frequency."""
    figure, axes = _new(f"Gain of each band of frequency, response {response}")
    edges = _edges(len(gains), lambda_max)
    axes.bar(edges[:-1], _finite(gains), edges[1], align="edge", color=SKY, edgecolor="white")
    axes.set_ylim(_limits(gains))
    if axes.get_ylim()[1] > 0.3:  # far below, 1 in sight would flatten what differs
        axes.set_ylim(_limits(gains, np.ones(1)))
        axes.axhline(1, color=GREY, ls=":")
        _beside(axes, "unchanged", 1)
    _frequencies(axes.xaxis, edges[-1])
    axes.set_ylabel("gain (output over input)")
    _few_ticks(axes.yaxis)
    _note(figure, gains)
    return figure


@styled
def block_role_figure(
    values: Values, blocks: Sequence[int], roles: Sequence[str], title: str, label: str
) -> "Figure":
    """One number a parameter, by block and role.

    Args:
        values: (blocks, roles), not negative; NaN where there is no parameter.
        blocks: block numbers.
        roles: role names; what those of all blocks begin and end with is said once. Those outside
            the blocks are left out.
        title: of the figure.
        label: of the numbers, with their unit.
    """
    inside = [i for i, role in enumerate(roles) if "*" in role or np.isfinite(values[:, i]).any()]
    values, roles = values[:, inside], [roles[i] for i in inside]
    figure, axes = _new(title, 1.9 + 0.26 * min(max(len(roles), 5), MOST_ROLES))
    norm = _wide_norm(values)
    columns, rows = (np.arange(count + 1) - 0.5 for count in values.shape)
    mesh = _mesh(axes, columns, rows, values.T, norm)
    names, shared = _shorten(roles)
    _names(axes.xaxis, [str(block) for block in blocks], MOST_BLOCKS)
    _names(axes.yaxis, names, MOST_ROLES)
    axes.invert_yaxis()
    axes.set_xlabel("block")
    axes.set_ylabel("role")
    is_below = norm is not None and bool((values <= 0).any())
    bar = figure.colorbar(mesh, pad=0.02, extend="min" if is_below else "neither")
    bar.set_label(label)
    _few_ticks(bar.ax.yaxis, norm)
    _note(figure, values, blank="blank: no such parameter, or not finite", also=shared)
    return figure


@styled
def perturbation_figure(blocks: Sequence[int], values: Values) -> "Figure":
    """How far the weights of each block are from the reference, ‖θ − θ_ref‖."""
    figure, axes = _new("Perturbation of the weights by block")
    axes.bar(np.arange(len(blocks)), _finite(values), 0.8, color=BLUE)
    _names(axes.xaxis, [str(block) for block in blocks], MOST_BLOCKS)
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    axes.set_xlabel("block")
    axes.set_ylabel(r"‖θ − θ$_\mathrm{ref}$‖ (units of the weights)")
    axes.set_ylim(_limits(values))
    _few_ticks(axes.yaxis)
    _note(figure, values)
    return figure


def _new(title: str, height: float = 4.2) -> "tuple[Figure, Axes]":
    """A figure of one pair of axes."""
    figure = new_figure(height)
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def _divide(figure: "Figure", axes: "Axes", heights: Sequence[float]) -> "Axes":
    """Put axes of the same frequencies under those of a figure."""
    grid = figure.add_gridspec(2, 1, height_ratios=heights)
    axes.set_subplotspec(grid[0])
    axes.tick_params(labelbottom=False)
    return figure.add_subplot(grid[1], sharex=axes)


def _mesh(
    axes: "Axes", x: Values, y: Values, values: Values, norm: "LogNorm | None" = None
) -> "QuadMesh":
    """A heat map of (rows, columns) between edges `y` and `x`."""
    shown = np.ma.masked_invalid(values)
    axes.set_facecolor(BLANK)
    if norm is not None:
        return axes.pcolormesh(x, y, shown, cmap=HEAT_MAP, norm=norm)
    highest = float(shown.max()) if shown.count() else 0.0
    return axes.pcolormesh(x, y, shown, cmap=HEAT_MAP, vmin=0, vmax=highest or 1.0)


def _wide_norm(values: Values) -> "LogNorm | None":
    """Colours by logarithm, where numbers span a wide range; zeros get the lowest."""
    from matplotlib.colors import LogNorm

    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size or positive.max() < WIDE_RANGE * positive.min():
        return None
    return LogNorm(positive.min(), positive.max(), clip=True)


def _frequencies(axis: "Axis", highest: float) -> None:
    axis.set_label_text("frequency λ")
    (axis.axes.set_xlim if axis is axis.axes.xaxis else axis.axes.set_ylim)(0, highest)
    _few_ticks(axis)


def _shares(axis: "Axis", label: str) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_label_text(label)
    _few_ticks(axis)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))


def _few_ticks(axis: "Axis", norm: "LogNorm | None" = None, integer: bool = False) -> None:
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


def _decades(axes: "Axes", label: str, *values: Values) -> None:
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


def _names(axis: "Axis", names: Sequence[str], most: int) -> None:
    """A tick for every name, or for every second, fifth, tenth and so on if there are too many."""
    strides = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    stride = next(s for s in strides if len(names) <= s * most)
    axis.set_ticks(range(0, len(names), stride), labels=names[::stride])


def _beside(axes: "Axes", text: str, height: float) -> None:
    """A word to the right of the axes."""
    axes.annotate(
        text, (1, height), (4, 0), xycoords=axes.get_yaxis_transform(), color=GREY,
        textcoords="offset points", va="center", fontsize="small",
    )  # fmt: skip


def _legend(axes: "Axes", labels: Sequence[str]) -> None:
    """What is drawn, in order, to the right of the title."""
    handles = axes.containers or axes.patches
    axes.legend(
        handles, labels, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(labels),
        borderaxespad=0, columnspacing=1.2,
    )  # fmt: skip


def _note(
    figure: "Figure", *values: Values, blank: str = "blank: not finite", also: str = ""
) -> None:
    """What a reader must know, at the foot of the figure: what is blank, if anything is."""
    has_blank = any(not np.isfinite(each).all() for each in values)
    lines = textwrap.wrap(also, LINE_LENGTH) + [blank] * has_blank
    if lines:
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize="small", color=GREY)


def _edges(bands: int, highest: float) -> Values:
    """Edges of equal bands; up to 1 on a graph without edges, whose only frequency is 0."""
    return np.linspace(0, highest if np.isfinite(highest) and highest > 0 else 1.0, bands + 1)


def _around(places: Values) -> Values:
    """Edges of cells around ascending places."""
    gaps = np.diff(places) if len(places) > 1 else np.ones(1)
    return np.concatenate(
        (places[:1] - gaps[:1] / 2, places[:-1] + gaps / 2, places[-1:] + gaps[-1:] / 2)
    )


def _finite(values: Values) -> Values:
    return np.asarray(np.where(np.isfinite(values), values, np.nan))


def _positive(values: Values) -> Values:
    return np.asarray(np.where(np.isfinite(values) & (values > 0), values, np.nan))


def _limits(*values: Values) -> tuple[float, float]:
    """Limits of an axis that shows 0 and all values."""
    found = np.concatenate(values)
    found = found[np.isfinite(found)]
    low, high = min([0.0, *found]), max([0.0, *found])
    margin = 0.06 * (high - low) or 1.0
    return low - margin * (low < 0), high + margin


def _shorten(roles: Sequence[str]) -> tuple[list[str], str]:
    """Names less what those of all blocks begin and end with, and a note of that."""
    inside = [role.split(".") for role in roles if "*" in role.split(".")]
    heads = [parts[: min(parts.index("*") + 1, len(parts) - 1)] for parts in inside]
    alike = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*heads, strict=False))
    head = "".join(f"{parts[0]}." for parts in alike)
    rests = [".".join(parts).removeprefix(head) for parts in inside]
    ends = {rest.partition(".")[2].rpartition(".")[2] for rest in rests}
    tail = f".{ends.pop()}" if len(ends) == 1 and not ends & {"", "*"} else ""
    names, half = [], (NAME_LENGTH - 1) // 2
    for role in roles:
        name = role.removeprefix(head).removesuffix(tail) if "*" in role.split(".") else role
        names.append(name if len(name) <= NAME_LENGTH else f"{name[:half]}…{name[-half:]}")
    said = [f"begin with {head}"] * bool(head) + [f"end in {tail}"] * bool(tail)
    return names, f"names {' and '.join(said)}" if said else ""
