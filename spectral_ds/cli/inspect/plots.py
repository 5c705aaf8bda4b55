"""Figures of what `spectral-ds inspect` has found, one PNG each."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spectral_ds.cli.inspect.activity_plot import activity_figure
from spectral_ds.cli.inspect.candidates import CandidateResult
from spectral_ds.cli.inspect.graph_properties import GraphProperties
from spectral_ds.cli.inspect.report import GraphReport, InspectReport
from spectral_ds.console.figure_style import (
    BLUE,
    COLORS,
    GREY,
    HEAT_MAP,
    RED,
    WIDE,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_LENGTH = 56  # characters of a panel's title, right of the roles
# Inches of a panel: without its lines, and of each line.
PANEL_HEIGHT, LINE_HEIGHT = 1.3, 0.3


def draw(report: InspectReport, folder: Path) -> list[Path]:
    """Draw all figures into a folder; their paths.

    `density.png`, `eigenvalues.png`, `degrees.png`, `roughness.png` of graphs of edges; with data,
    `snr.png`; of activations, `activity.png`.
    """
    figures: dict[str, Callable[[], Figure]] = {}
    if report.graphs:
        figures = {
            "density": lambda: role_densities(report.graphs),
            "eigenvalues": lambda: role_eigenvalues(report.graphs),
            "degrees": lambda: degree_histograms(report.graphs),
            "roughness": lambda: role_roughness(report.graphs),
        }
    activities = [each for each in report.activity if each.roles]
    if activities:
        figures["activity"] = lambda: activity_figure(activities)
    results = [each for each in report.candidates or () if each.kept_over_total is not None]
    if results:
        figures["snr"] = lambda: candidate_ratios(results)
    paths = []
    for name, make in figures.items():
        paths.append(folder / f"{name}.png")
        make().savefig(paths[-1])
    return paths


def _parts(graph: GraphReport) -> dict[str, GraphProperties]:
    """All of a graph, and those of its roles that have edges."""
    joined = {role: part for role, part in graph.roles.items() if part.edges > 0}
    return {"all": graph.whole, **joined}


def _panels(graphs: Sequence[GraphReport], title: str) -> "tuple[Figure, list[Axes]]":
    """One panel a graph, as high as its roles need."""
    heights = [PANEL_HEIGHT + LINE_HEIGHT * len(_parts(graph)) for graph in graphs]
    figure = new_figure(0.8 + sum(heights), WIDE)
    grid = figure.subplots(len(graphs), squeeze=False, height_ratios=heights)
    figure.suptitle(title, x=0.01, ha="left")
    panels = list(grid[:, 0])
    for axes, graph in zip(panels, graphs, strict=True):
        words = f"{graph.name}: {', '.join(graph.families)}"
        axes.set_title(textwrap.fill(words, LINE_LENGTH))
    return figure, panels


def _label_roles(axes: "Axes", roles: Sequence[str]) -> None:
    axes.set_yticks(range(len(roles)), roles)
    axes.set_ylim(len(roles) - 0.5, -0.5)
    axes.set_ylabel("role")


@styled
def role_densities(graphs: Sequence[GraphReport]) -> "Figure":
    """Where the eigenvalues are: one line of the picture a role, the whole graph on top."""
    figure, panels = _panels(graphs, "Density of states: share of the eigenvalues")
    for axes, graph in zip(panels, graphs, strict=True):
        lines = _parts(graph)
        bound = graph.whole.lambda_max_bound
        picture = axes.imshow(
            np.array([part.density for part in lines.values()]), aspect="auto", cmap=HEAT_MAP,
            extent=(0, bound, len(lines) - 0.5, -0.5), interpolation="nearest", vmin=0,
        )  # fmt: skip
        _label_roles(axes, list(lines))
        axes.set_xlabel("frequency λ")
        figure.colorbar(picture, ax=axes, label="share of a bin", pad=0.01)
    return figure


@styled
def role_eigenvalues(graphs: Sequence[GraphReport]) -> "Figure":
    """The lowest eigenvalues above 0 and the largest, a line a role."""
    figure, panels = _panels(graphs, "Lowest eigenvalues above 0, and the largest")
    for axes, graph in zip(panels, graphs, strict=True):
        lines = _parts(graph)
        for line, part in enumerate(lines.values()):
            lowest = part.lowest_eigenvalues or []
            words = (None, None) if line else ("lowest above 0", "largest")
            at = [line] * len(lowest)
            axes.plot(lowest, at, "|", color=BLUE, markersize=10, label=words[0])
            axes.plot(part.lambda_max, line, "o", color=RED, markersize=4, label=words[1])
        axes.set_xlim(left=0)
        _label_roles(axes, list(lines))
        axes.grid(axis="x", color=GREY, linewidth=0.3)
        axes.set_xlabel("frequency λ")
    marks = panels[0].get_legend_handles_labels()
    figure.legend(*marks, loc="outside lower right", ncols=2)
    return figure


@styled
def degree_histograms(graphs: Sequence[GraphReport]) -> "Figure":
    """How many nodes have which degree."""
    figure = new_figure(4.2, WIDE)
    grid = figure.subplots(1, len(graphs), squeeze=False)
    for axes, graph in zip(grid[0], graphs, strict=True):
        counts, degree = graph.whole.degree_histogram, graph.whole.degree
        edges = np.linspace(0, degree.max or 1.0, len(counts) + 1)
        axes.stairs(counts, edges, fill=True, color=BLUE)
        axes.axvline(degree.mean, color=RED, linewidth=1, label=f"mean {degree.mean:.3g}")
        axes.set_title(f"{graph.name}: degrees of {graph.whole.nodes:,} nodes")
        axes.set_xlabel("degree (sum of a node's edge weights)")
        axes.set_ylabel("nodes")
        axes.legend()
    return figure


@styled
def role_roughness(graphs: Sequence[GraphReport]) -> "Figure":
    """xᵀLx/xᵀx of the weights over that of random directions, a bar a role."""
    figure, panels = _panels(graphs, "Roughness of the weights (1: random directions)")
    for axes, graph in zip(panels, graphs, strict=True):
        lines = _parts(graph)
        ratios = [part.roughness.ratio or 0.0 for part in lines.values()]
        axes.barh(range(len(lines)), ratios, color=BLUE, height=0.6)
        axes.axvline(1, color=RED, linewidth=1)
        _label_roles(axes, list(lines))
        axes.set_xlabel("xᵀLx / xᵀx of the weights over that of random directions")
    return figure


@styled
def candidate_ratios(results: Sequence[CandidateResult]) -> "Figure":
    """Signal-to-noise ratio by band of frequency over that of all, a line a graph."""
    figure = new_figure(4.8, WIDE)
    axes = figure.subplots()
    for index, result in enumerate(results):
        signal, noise = np.maximum(result.signal, 0), np.maximum(result.noise, 0)
        known = (signal > 0) & (noise > 0)
        total = signal.sum() / noise.sum()
        ratio = np.where(known, signal / np.where(known, noise, 1) / total, np.nan)
        share = (np.arange(len(signal)) + 0.5) / len(signal)
        axes.plot(
            share, ratio, color=COLORS[index % len(COLORS)], marker="o", markersize=4,
            linestyle="-" if index < len(COLORS) else "--", linewidth=1.5,
            label=f"{result.name} ({result.kept_over_total:.2f})",
        )  # fmt: skip
    axes.axhline(1, color=GREY, linewidth=1, label="a random basis")
    axes.set_yscale("log")
    axes.set_xlim(0, 1)
    axes.set_xlabel("frequency, as a share of [0, λ_max]")
    axes.set_ylabel("signal-to-noise ratio\nof a band over the total")
    figure.suptitle(
        "Signal and noise of the gradient (in brackets: ratio of the lowest eighth over the total)",
        x=0.01, ha="left",
    )  # fmt: skip
    figure.legend(loc="outside right center", fontsize="small")
    return figure
