"""Figures of a graph of activations: which directions are active, and what goes along them.

In: float64 arrays and readings. Out: a matplotlib figure in the style of `console.figure_style`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from spectral_ds.console.figure_style import BLUE, COLORS, GREY, ORANGE, RED, SKY, styled
from spectral_ds.monitor.axes import (
    Values,
    around,
    as_names,
    as_shares,
    beside,
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
)
from spectral_ds.monitor.figures import shortened
from spectral_ds.monitor.readings import ActivityReading

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Of a picture: lines that can be told apart, and bands with a name each.
MOST_LINES, MOST_BANDS = 2 * len(COLORS), 12
DIRECTIONS = "directions of the inputs (1: the most active)"


@styled
def spectrum_figure(eigenvalues: Mapping[tuple[str, ...], Values]) -> "Figure":
    """How active the most active directions are: a line for the roles that share a graph.

    Args:
        eigenvalues: by roles, (k,), largest first.
    """
    figure, axes = new_axes("Activity of the inputs, direction by direction", 4.8)
    names, shared = shortened([roles[0] for roles in eigenvalues])
    shown = list(zip(names, eigenvalues.items(), strict=True))[:MOST_LINES]
    lines = []
    for number, (name, (roles, values)) in enumerate(shown):
        [line] = axes.plot(
            np.arange(1, len(values) + 1), positive(values), color=COLORS[number % len(COLORS)],
            ls="-" if number < len(COLORS) else "--", lw=2, marker="o" if len(values) == 1 else "",
            label=name if len(roles) == 1 else f"{name} and {len(roles) - 1} more",
        )  # fmt: skip
        lines.append(line)
    axes.set_xscale("log")
    most = max((len(values) for values in eigenvalues.values()), default=1)
    axes.set_xlim(1, max(most, 2))
    _powers_of_two(axes.xaxis, most)
    axes.axhline(1, color=GREY, ls=":")
    beside(axes, "average", 1)
    shown_values = [positive(values) for values in eigenvalues.values()]
    in_decades(axes, "activity a (mean of all directions: 1)", *shown_values, np.ones(1))
    axes.set_xlabel(DIRECTIONS)
    axes.legend(handles=lines, loc="upper right", ncols=1 + len(lines) // 8, fontsize="small")
    hidden = len(eigenvalues) - len(shown)
    more = f"; {hidden} more roles are not shown" if hidden else ""
    note(figure, *eigenvalues.values(), also=f"median over blocks; {shared}{more}".rstrip("; "))
    return figure


@styled
def response_figure(graph: ActivityReading, response: str) -> "Figure":
    """What the filter does to directions of which activity, and where the activity is."""
    figure, axes = new_axes("Filter by activity")
    axes.set_xscale("log")
    axes.set_xlim(graph.edges[0], graph.edges[-1])
    axes.set_xlabel("activity a (mean of all directions: 1)")
    if graph.held is None:
        axes.set_xlabel("activity of what is kept over that of what is learned")
        over = axes
    else:
        widths = np.diff(graph.edges)
        axes.bar(
            graph.edges[:-1], finite(graph.held), widths, align="edge", color=SKY, edgecolor="white"
        )
        axes.set_ylim(0, limits(graph.held)[1])
        as_shares(axes.yaxis, "share of all activity")
        over = axes.twinx()
        over.spines["right"].set_visible(True)
        over.tick_params(axis="y", labelcolor=RED)
    over.plot(graph.frequencies, finite(graph.gains), color=RED, lw=2.5)
    over.set_ylabel(f"gain, {response} at strength {graph.strength:.3g}", color=RED)
    few_ticks(over.yaxis)
    over.set_ylim(limits(graph.gains))
    note(figure, graph.gains)
    return figure


@styled
def energy_figure(what: str, before: Values, after: Values, names: Sequence[str]) -> "Figure":
    """Shares of the squared norm by band of directions, before and after the filter.

    Args:
        what: the signal, "gradient" or "update".
        before, after: (bands,).
        names: of the bands.
    """
    figure, axes = new_axes(f"Energy of the {what} by activity")
    at = np.arange(len(before))
    axes.bar(at - 0.43, finite(before), 0.43, align="edge", color=BLUE)
    axes.bar(at, finite(after), 0.43, align="edge", color=ORANGE)
    axes.set_xlim(-0.6, len(before) - 0.4)
    as_names(axes.xaxis, names, MOST_BANDS)
    axes.set_xlabel(DIRECTIONS)
    as_shares(axes.yaxis, "share of the squared norm")
    axes.set_ylim(0, limits(before, after)[1])
    legend_above(axes, ["before the filter", "after"])
    note(figure, before, after)
    return figure


@styled
def energy_history_figure(steps: Values, energies: Values, names: Sequence[str]) -> "Figure":
    """Shares of the squared norm by band of directions over the run.

    Args:
        steps: (T,): optimizer steps; of one that comes twice, as after a resume, the last counts.
        energies: (T, bands).
        names: of the bands.
    """
    figure, axes = new_axes("Energy by activity, over the run")
    steps, energies = last_of_each(steps, energies)
    bands = np.arange(energies.shape[1] + 1) - 0.5
    mesh = mesh_of(axes, around(steps), bands, energies.T)
    axes.set_xlabel("optimizer step")
    few_ticks(axes.xaxis, integer=True)
    as_names(axes.yaxis, names, MOST_BANDS)
    axes.set_ylabel("directions (1: the most active)")
    as_shares(figure.colorbar(mesh, pad=0.02).ax.yaxis, "share of the squared norm")
    note(figure, energies)
    return figure


def _powers_of_two(axis: "Axis", most: int) -> None:
    """A tick for 1, 2, 4 and so on, or for every second of them."""
    from matplotlib.ticker import NullLocator

    powers = [2**power for power in range(most.bit_length())]
    powers = powers[:: 1 + len(powers) // 10]
    axis.set_ticks(powers, labels=[str(power) for power in powers])
    axis.set_minor_locator(NullLocator())
