"""Figures of what `spectral-ds inspect` has found, one PNG each."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spectral_ds.cli.candidates import Verdict
from spectral_ds.cli.inspection import Facts
from spectral_ds.cli.summary import GraphSummary, Summary

# Okabe and Ito's colours, which colour-blind people can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000")
BLUE, RED, GREY = "#0072B2", "#D55E00", "#999999"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
WIDTH, DPI = 8.0, 150
LINE_LENGTH = 56  # characters of a panel's title, right of the roles


def draw(summary: Summary, folder: Path) -> list[Path]:
    """Draw all figures into a folder; their paths.

    `density.png`, `eigenvalues.png`, `degrees.png`, `roughness.png` and, with data, `snr.png`.
    """
    figures: dict[str, Callable[[], Figure]] = {
        "density": lambda: _density(summary.graphs),
        "eigenvalues": lambda: _eigenvalues(summary.graphs),
        "degrees": lambda: _degrees(summary.graphs),
        "roughness": lambda: _roughness(summary.graphs),
    }
    verdicts = [v for v in summary.candidates or () if v.kept_over_total is not None]
    if verdicts:
        figures["snr"] = lambda: _snr(verdicts)
    paths = []
    with plt.rc_context(STYLE):
        for name, make in figures.items():
            figure = make()
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=DPI)
            plt.close(figure)
    return paths


def _joined(graph: GraphSummary) -> dict[str, Facts]:
    """The roles that have edges."""
    return {role: facts for role, facts in graph.roles.items() if facts.edges > 0}


def _panels(graphs: Sequence[GraphSummary], title: str) -> tuple[Figure, list[Axes]]:
    """One panel a graph, as high as its roles need."""
    heights = [1.0 + 0.22 * len(_joined(graph)) for graph in graphs]
    figure, grid = plt.subplots(
        len(graphs), figsize=(WIDTH, 0.6 + sum(heights)), squeeze=False, layout="constrained",
        height_ratios=heights,
    )  # fmt: skip
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    panels = list(grid[:, 0])
    for axes, graph in zip(panels, graphs, strict=True):
        words = f"{graph.name}: {', '.join(graph.families)}"
        axes.set_title(textwrap.fill(words, LINE_LENGTH), loc="left")
    return figure, panels


def _label_roles(axes: Axes, roles: Sequence[str]) -> None:
    axes.set_yticks(range(len(roles)), roles)
    axes.set_ylim(len(roles) - 0.5, -0.5)
    axes.set_ylabel("role")


def _density(graphs: Sequence[GraphSummary]) -> Figure:
    """Where the eigenvalues are: one line of the picture a role, the whole graph on top."""
    figure, panels = _panels(graphs, "Density of states: share of the eigenvalues")
    for axes, graph in zip(panels, graphs, strict=True):
        lines = {"all": graph.whole, **_joined(graph)}
        bound = graph.whole.lambda_max_bound
        picture = axes.imshow(
            np.array([facts.density for facts in lines.values()]), aspect="auto", cmap="Blues",
            extent=(0, bound, len(lines) - 0.5, -0.5), interpolation="nearest", vmin=0,
        )  # fmt: skip
        _label_roles(axes, list(lines))
        axes.set_xlabel("frequency λ")
        figure.colorbar(picture, ax=axes, label="share of a bin", pad=0.01)
    return figure


def _eigenvalues(graphs: Sequence[GraphSummary]) -> Figure:
    """The lowest eigenvalues above 0 and the largest, a line a role."""
    figure, panels = _panels(graphs, "Lowest eigenvalues above 0, and the largest")
    for axes, graph in zip(panels, graphs, strict=True):
        lines = {"all": graph.whole, **_joined(graph)}
        for line, facts in enumerate(lines.values()):
            lowest = facts.lowest_eigenvalues or []
            words = (None, None) if line else ("lowest above 0", "largest")
            at = [line] * len(lowest)
            axes.plot(lowest, at, "|", color=BLUE, markersize=10, label=words[0])
            axes.plot(facts.lambda_max, line, "o", color=RED, markersize=4, label=words[1])
        axes.set_xlim(left=0)
        _label_roles(axes, list(lines))
        axes.grid(axis="x", color=GREY, linewidth=0.3)
        axes.set_xlabel("frequency λ")
    marks = panels[0].get_legend_handles_labels()
    figure.legend(*marks, loc="outside lower right", ncols=2, frameon=False)
    return figure


def _degrees(graphs: Sequence[GraphSummary]) -> Figure:
    """How many nodes have which degree."""
    figure, grid = plt.subplots(
        1, len(graphs), figsize=(WIDTH, 3), squeeze=False, layout="constrained"
    )
    for axes, graph in zip(grid[0], graphs, strict=True):
        counts, degree = graph.whole.degree_histogram, graph.whole.degree
        edges = np.linspace(0, degree.max or 1.0, len(counts) + 1)
        axes.stairs(counts, edges, fill=True, color=BLUE)
        axes.axvline(degree.mean, color=RED, linewidth=1, label=f"mean {degree.mean:.3g}")
        axes.set_title(f"{graph.name}: degrees of {graph.whole.nodes:,} nodes", loc="left")
        axes.set_xlabel("degree (sum of a node's edge weights)")
        axes.set_ylabel("nodes")
        axes.legend(frameon=False)
    return figure


def _roughness(graphs: Sequence[GraphSummary]) -> Figure:
    """xᵀLx/xᵀx of the weights over that of random directions, a bar a role."""
    figure, panels = _panels(graphs, "Roughness of the weights (1: random directions)")
    for axes, graph in zip(panels, graphs, strict=True):
        lines = {"all": graph.whole, **_joined(graph)}
        ratios = [facts.roughness.ratio or 0.0 for facts in lines.values()]
        axes.barh(range(len(lines)), ratios, color=BLUE, height=0.6)
        axes.axvline(1, color=RED, linewidth=1)
        _label_roles(axes, list(lines))
        axes.set_xlabel("xᵀLx / xᵀx of the weights over that of random directions")
    return figure


def _snr(verdicts: Sequence[Verdict]) -> Figure:
    """Signal-to-noise ratio by band of frequency over that of all, a line a graph."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    for index, verdict in enumerate(verdicts):
        signal, noise = np.maximum(verdict.signal, 0), np.maximum(verdict.noise, 0)
        known = (signal > 0) & (noise > 0)
        total = signal.sum() / noise.sum()
        ratio = np.where(known, signal / np.where(known, noise, 1) / total, np.nan)
        share = (np.arange(len(signal)) + 0.5) / len(signal)
        axes.plot(
            share, ratio, color=COLORS[index % len(COLORS)], marker="o", markersize=4,
            linestyle="-" if index < len(COLORS) else "--", linewidth=1.5,
            label=f"{verdict.name} ({verdict.kept_over_total:.2f})",
        )  # fmt: skip
    axes.axhline(1, color=GREY, linewidth=1, label="a random basis")
    axes.set_yscale("log")
    axes.set_xlim(0, 1)
    axes.set_xlabel("frequency, as a share of [0, λ_max]")
    axes.set_ylabel("signal-to-noise ratio\nof a band over the total")
    figure.suptitle(
        "Signal and noise of the gradient (in brackets: ratio of the lowest eighth over the total)",
        x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure
