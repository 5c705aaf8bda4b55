"""Figures: numbers drawn for people, 800 pixels wide.

In: float64 arrays, of which anything that is not finite is left blank, and said. Out: a matplotlib
figure in the style of `console.figure_style`.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from spectral_ds.console.figure_style import BLUE, GREY, ORANGE, RED, SKY, styled
from spectral_ds.monitor.axes import (
    Values,
    around,
    as_names,
    as_shares,
    beside,
    divide,
    few_ticks,
    finite,
    in_decades,
    last_of_each,
    legend_above,
    limits,
    mesh_of,
    new_axes,
    note,
    positive,
    wide_norm,
)

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

NAME_LENGTH = 32  # characters of a role
MOST_BLOCKS, MOST_ROLES = 16, 36  # with a label each


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
    figure, axes = new_axes("Density of states and filter")
    edges = edges if edges[-1] > edges[0] else _edges(len(share), 1.0)
    middles = (edges[:-1] + edges[1:]) / 2
    axes.bar(edges[:-1], finite(share), np.diff(edges), align="edge", color=SKY, edgecolor="white")
    _frequencies(axes.xaxis, edges[-1])
    as_shares(axes.yaxis, "share of the eigenvalues")
    over = axes.twinx()
    over.plot(middles, finite(gains), color=RED, lw=2.5, marker="o" if len(gains) <= 32 else "")
    over.spines["right"].set_visible(True)
    over.tick_params(axis="y", labelcolor=RED)
    over.set_ylabel(f"gain, {response} at strength {strength:.3g}", color=RED)
    few_ticks(over.yaxis)
    over.set_ylim(limits(gains))
    axes.set_ylim(0, limits(share)[1])
    if over.get_ylim()[0] < 0:  # no longer at the height of the bars' zero
        over.axhline(0, color=RED, ls=":")
    note(figure, share, gains)
    return figure


@styled
def energy_figure(before: Values, after: Values, lambda_max: float) -> "Figure":
    """Shares of the squared norm in equal bands of frequency, before and after the filter."""
    figure, axes = new_axes("Energy by frequency")
    edges = _edges(len(before), lambda_max)
    width = 0.43 * edges[1]
    middles = (edges[:-1] + edges[1:]) / 2
    axes.bar(middles - width, finite(before), width, align="edge", color=BLUE)
    axes.bar(middles, finite(after), width, align="edge", color=ORANGE)
    _frequencies(axes.xaxis, edges[-1])
    as_shares(axes.yaxis, "share of the squared norm")
    axes.set_ylim(0, limits(before, after)[1])
    legend_above(axes, ["before the filter", "after"])
    note(figure, before, after)
    return figure


@styled
def energy_history_figure(steps: Values, energies: Values, lambda_max: float) -> "Figure":
    """Shares of the squared norm by frequency over the run.

    Args:
        steps: (T,): optimizer steps; of one that comes twice, as after a resume, the last counts.
        energies: (T, bands).
        lambda_max: the highest frequency.
    """
    figure, axes = new_axes("Energy by frequency, over the run")
    steps, energies = last_of_each(steps, energies)
    edges = _edges(energies.shape[1], lambda_max)
    mesh = mesh_of(axes, around(steps), edges, energies.T)
    axes.set_xlabel("optimizer step")
    few_ticks(axes.xaxis, integer=True)
    _frequencies(axes.yaxis, edges[-1])
    as_shares(figure.colorbar(mesh, pad=0.02).ax.yaxis, "share of the squared norm")
    note(figure, energies)
    return figure


@styled
def signal_to_noise_figure(signal: Values, noise: Values, lambda_max: float) -> "Figure":
    """Power of signal and noise in equal bands of frequency, and their ratio.

    Both are unbiased estimates; one that is not above zero has no line.
    """
    figure, powers = new_axes("Signal and noise of the gradient by frequency", 5.2)
    ratios = divide(figure, powers, (3, 2))
    edges = _edges(len(signal), lambda_max)
    signal, noise = positive(signal), positive(noise)
    ratio = signal / noise
    powers.stairs(signal, edges, baseline=None, color=BLUE, lw=2.5)
    powers.stairs(noise, edges, baseline=None, color=RED, lw=2.5, ls=(0, (3, 1)))
    in_decades(powers, "power ‖g‖²", signal, noise)
    legend_above(powers, ["signal", "noise"])
    ratios.stairs(ratio, edges, baseline=None, color="black", lw=2.5)
    total = np.array([np.nan])
    if np.isfinite(ratio).any():
        total[0] = np.nansum(signal) / np.nansum(noise)
        ratios.axhline(total[0], color=GREY, ls=":")
        beside(ratios, "total", total[0])
    in_decades(ratios, "signal / noise", ratio, total)
    _frequencies(ratios.xaxis, edges[-1])
    note(figure, signal, noise, blank="no line: the estimate is not above zero")
    return figure


@styled
def gains_figure(gains: Values, lambda_max: float, response: str) -> "Figure":
    """The gain of each of equal bands of frequency."""
    figure, axes = new_axes(f"Gain of each band of frequency, response {response}")
    edges = _edges(len(gains), lambda_max)
    axes.bar(edges[:-1], finite(gains), edges[1], align="edge", color=SKY, edgecolor="white")
    axes.set_ylim(limits(gains))
    if axes.get_ylim()[1] > 0.3:  # far below, 1 in sight would flatten what differs
        axes.set_ylim(limits(gains, np.ones(1)))
        axes.axhline(1, color=GREY, ls=":")
        beside(axes, "unchanged", 1)
    _frequencies(axes.xaxis, edges[-1])
    axes.set_ylabel("gain (output over input)")
    few_ticks(axes.yaxis)
    note(figure, gains)
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
    figure, axes = new_axes(title, 1.9 + 0.26 * min(max(len(roles), 5), MOST_ROLES))
    norm = wide_norm(values)
    columns, rows = (np.arange(count + 1) - 0.5 for count in values.shape)
    mesh = mesh_of(axes, columns, rows, values.T, norm)
    names, shared = shortened(roles)
    as_names(axes.xaxis, [str(block) for block in blocks], MOST_BLOCKS)
    as_names(axes.yaxis, names, MOST_ROLES)
    axes.invert_yaxis()
    axes.set_xlabel("block")
    axes.set_ylabel("role")
    is_below = norm is not None and bool((values <= 0).any())
    bar = figure.colorbar(mesh, pad=0.02, extend="min" if is_below else "neither")
    bar.set_label(label)
    few_ticks(bar.ax.yaxis, norm)
    note(figure, values, blank="blank: no such parameter, or not finite", also=shared)
    return figure


@styled
def perturbation_figure(blocks: Sequence[int], values: Values) -> "Figure":
    """How far the weights of each block are from the reference, ‖θ − θ_ref‖."""
    figure, axes = new_axes("Perturbation of the weights by block")
    axes.bar(np.arange(len(blocks)), finite(values), 0.8, color=BLUE)
    as_names(axes.xaxis, [str(block) for block in blocks], MOST_BLOCKS)
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    axes.set_xlabel("block")
    axes.set_ylabel(r"‖θ − θ$_\mathrm{ref}$‖ (units of the weights)")
    axes.set_ylim(limits(values))
    few_ticks(axes.yaxis)
    note(figure, values)
    return figure


def _frequencies(axis: "Axis", highest: float) -> None:
    axis.set_label_text("frequency λ")
    (axis.axes.set_xlim if axis is axis.axes.xaxis else axis.axes.set_ylim)(0, highest)
    few_ticks(axis)


def _edges(bands: int, highest: float) -> Values:
    """Edges of equal bands; up to 1 on a graph without edges, whose only frequency is 0."""
    return np.linspace(0, highest if np.isfinite(highest) and highest > 0 else 1.0, bands + 1)


def shortened(roles: Sequence[str]) -> tuple[list[str], str]:
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
