"""Draws what the README shows of graphs and responses, with the package's own graphs and filters.

In:  --output, a folder.
Out: responses.png, every response over the frequencies of a small similarity graph, with its
     Chebyshev series; frequencies.png, a low, a middle and a high frequency of a depth path, a ring
     and a similarity graph.

    python launch/responses.py [--output .github/figures]
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.polynomial import chebyshev
from PIL import Image

from spectral_ds.config import FilterConfig
from spectral_ds.console.figure_style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    WIDE,
    new_figure,
    styled,
)
from spectral_ds.filters import (
    BandTransfer,
    FixedTransfer,
    Transfer,
    whiten_gains,
    wiener_gains,
)
from spectral_ds.graph import Depth, EdgeFamily, ParameterNodes, Ring, Similarity
from spectral_ds.laplacian import ParameterGraph
from spectral_ds.sharding import Communicator, Fragment, ShardLayout
from spectral_ds.sketches import WeightFeatures
from spectral_ds.spectrum import COEFFICIENTS_PER_BAND, SignalAndNoise, equal_edges
from spectral_ds.stack.responses import smooth_response, step_gains

Values = npt.NDArray[np.float64]

DEVICE = torch.device("cpu")
BANDS = 8
COLORS = 64  # of an image file
# A gradient whose signal falls with frequency, under noise that is alike everywhere: power a band.
SIGNAL = 4.0 * np.exp(-0.75 * np.arange(BANDS))
NOISE = np.full(BANDS, 0.5)
# What each panel shows: a title and the settings of its curves, each with a label.
PANELS: list[tuple[str, list[tuple[str, FilterConfig]]]] = [
    ("identity  1", [("", FilterConfig("identity"))]),
    (
        "heat  exp(−τλ)",
        [("τ = 1", FilterConfig("heat", tau=1.0)), ("τ = 4", FilterConfig("heat", tau=4.0))],
    ),
    (
        "tikhonov  1/(1 + τλ)",
        [
            ("τ = 1", FilterConfig("tikhonov", tau=1.0)),
            ("τ = 4", FilterConfig("tikhonov", tau=4.0)),
        ],
    ),
    (
        "window  1 − (α/2)λ",
        [
            ("α = 0.4", FilterConfig("window", alpha=0.4)),
            ("α = 1", FilterConfig("window", alpha=1.0)),
        ],
    ),
    ("lowpass  cutoff 0.25", [("", FilterConfig("lowpass"))]),
    ("highpass  cutoff 0.25", [("", FilterConfig("highpass"))]),
    ("bandpass  0.25 to 0.5", [("", FilterConfig("bandpass", low=0.25))]),
    ("bands  1, 0.2, 0.6, 0.4", [("", FilterConfig("bands", gains=(1.0, 0.2, 0.6, 0.4)))]),
    ("polynomial  1 − λ + λ²/4", [("", FilterConfig("polynomial", coefficients=(1, -1, 0.25)))]),
    ("a gradient (made up)", []),
    ("wiener  S/(S + N)", [("", FilterConfig("wiener"))]),
    ("whiten  ∝ 1/√(S + N)", [("", FilterConfig("whiten"))]),
]


def make_graph(
    parameters: Sequence[ParameterNodes],
    weights: Sequence[torch.Tensor],
    family: EdgeFamily,
    normalized: bool,
) -> ParameterGraph:
    """The graph of one rank that owns everything."""
    communicator = Communicator(None, DEVICE)
    layout = ShardLayout.gather([Fragment(p.name, 0, p.numel) for p in parameters], communicator)
    features = WeightFeatures(layout.own, [w.reshape(-1) for w in weights], 0, communicator)
    return ParameterGraph.build(
        parameters,
        [family],
        layout,
        {"weights": features},
        communicator,
        normalized=normalized,
        progress=lambda done: None,
    )


def points(side: int) -> torch.Tensor:
    """Rows (x, y, 1) near a square lattice: near ones have a large cosine; (side², 3), float32."""
    generator = torch.Generator().manual_seed(3)
    line = torch.linspace(-0.5, 0.5, side)
    plane = torch.cartesian_prod(line, line)
    plane += (2 * torch.rand(side**2, 2, generator=generator) - 1) * 0.3 / side
    return torch.cat([plane, torch.ones(side**2, 1)], dim=1)


def similarity_graph(rows: torch.Tensor, neighbours: int, normalized: bool) -> ParameterGraph:
    """Rows joined to those of the largest cosine."""
    nodes = ParameterNodes("weight", tuple(rows.shape))
    return make_graph([nodes], [rows], Similarity(neighbours), normalized)


def make_transfer(
    settings: FilterConfig, graph: ParameterGraph
) -> tuple[Transfer, Values, Values | None]:
    """A response as the filter evaluates it, the edges of its bands as shares, and their gains."""
    estimate = SignalAndNoise(torch.from_numpy(SIGNAL), torch.from_numpy(NOISE))
    adaptive: dict[str, Callable[[], torch.Tensor]] = {
        "wiener": lambda: wiener_gains(estimate),
        "whiten": lambda: whiten_gains(estimate.signal + estimate.noise, settings.power),
    }
    if settings.response in adaptive:
        gains, order = adaptive[settings.response], COEFFICIENTS_PER_BAND * BANDS - 1
        edges = equal_edges(BANDS)
        transfer = BandTransfer(edges, gains, lambda: 0, order, DEVICE)
        return transfer, edges, gains().numpy()
    steps = step_gains(settings)
    if steps is not None:
        fixed = torch.tensor(steps[1], dtype=torch.float64)
        transfer = BandTransfer(steps[0], lambda: fixed, lambda: 0, steps[2], DEVICE)
        return transfer, np.array(steps[0]), fixed.numpy()
    response = smooth_response(settings)
    exact = FixedTransfer(
        response, graph.lambda_max, graph.only_paths, settings.order, settings.tolerance, DEVICE
    )
    return exact, np.zeros(0), None


def draw_response(
    axes: Axes, curves: list[tuple[str, FilterConfig]], graph: ParameterGraph
) -> None:
    """The curves of one panel, each with the order of its series."""
    x = np.linspace(-1, 1, 801)
    frequency = graph.lambda_max / 2 * (x + 1)
    for line, (label, settings) in enumerate(curves):
        color = (BLUE, GREEN)[line]
        transfer, edges, gains = make_transfer(settings, graph)
        if gains is not None:
            axes.stairs(gains, graph.lambda_max * edges, color=GREY, baseline=None)
        axes.plot(frequency, transfer.at(x)().numpy(), color=color, linewidth=2)
        note = f"order {transfer.hops}"
        if gains is None:
            series = chebyshev.chebval(x, transfer.coefficients().numpy())
            axes.plot(frequency, series, color=ORANGE, linewidth=1.4, linestyle=(0, (3, 3)))
        axes.text(
            0.99, 0.95 - 0.1 * line, f"{label}, {note}" if label else note, color=color, ha="right",
            va="top", fontsize="small", transform=axes.transAxes,
        )  # fmt: skip


def draw_gradient(axes: Axes, lambda_max: float) -> None:
    """Signal and noise of the gradient that adaptive responses follow."""
    edges = lambda_max * equal_edges(BANDS)
    axes.stairs(SIGNAL, edges, color=BLUE, linewidth=2)
    axes.stairs(NOISE, edges, color=RED, linewidth=2)
    axes.set_ylim(0, 4.6)
    axes.set_yticks([0, 2, 4])
    axes.text(0.35, 2.6, "signal S", color=BLUE)
    axes.text(1.1, 0.75, "noise N", color=RED)


@styled
def draw_responses() -> Figure:
    """Small multiples of every response."""
    graph = similarity_graph(points(8), 8, normalized=True)
    spectrum = np.linalg.eigvalsh(graph.laplacian().toarray())
    figure = new_figure(9.4, WIDE)
    grid = figure.subplots(3, 4, sharex=True)
    for axes, (title, curves) in zip(grid.flat, PANELS, strict=True):
        axes.set_title(title)
        axes.set_ylim(-0.12, 1.4)
        axes.set_yticks([0, 0.5, 1])
        if curves:
            draw_response(axes, curves, graph)
            axes.plot(spectrum, np.full_like(spectrum, -0.07), "|", color=GREY, markersize=4)
        else:
            draw_gradient(axes, graph.lambda_max)
            axes.set_ylabel("power of a band")
    for axes in grid[:, 0]:
        axes.set_ylabel("response h(λ)")
    for axes in grid[-1]:
        axes.set_xlabel("frequency λ")
        axes.set_xticks([0, 0.5, 1, 1.5, 2], ["0", "", "1", "", "2"])
    whiten = grid[-1, -1]
    whiten.set_ylim(-0.12 * 2, 1.4 * 2)
    whiten.set_yticks([0, 1, 2])
    figure.legend(
        handles=[
            Line2D([], [], color=BLUE, linewidth=2, label="response h(λ)"),
            Line2D([], [], color=ORANGE, linestyle=(0, (3, 3)), label="its Chebyshev series"),
            Line2D([], [], color=GREY, label="gains of the bands"),
            Line2D([], [], color=GREY, marker="|", linestyle="", label="eigenvalues of the graph"),
        ],
        loc="outside lower center",
        ncols=4,
    )
    return figure


def draw_signal(
    axes: Axes, graph: ParameterGraph, places: Values, signal: Values
) -> PathCollection:
    """Nodes at their places, coloured by a signal, and edges; `places` is (nodes, 2)."""
    laplacian = graph.laplacian().tocoo()
    for a, b in zip(laplacian.row, laplacian.col, strict=True):
        if a < b:
            axes.plot(*places[[a, b]].T, color=GREY, linewidth=0.8, zorder=1)
    colors = LinearSegmentedColormap.from_list("signed", [BLUE, "#ffffff", RED])
    height = float(np.abs(signal).max())
    x, y = places.T
    axes.set_xticks([])
    axes.set_yticks([])
    return axes.scatter(
        x, y, c=signal / height, cmap=colors, vmin=-1, vmax=1, s=36, edgecolors="black",
        linewidths=0.6, zorder=2,
    )  # fmt: skip


def example_graphs() -> list[tuple[str, ParameterGraph, Values | None]]:
    """A small graph of each kind: name, graph, places of its nodes, (nodes, 2), None for a path."""
    rows = points(8)
    layers = [ParameterNodes(f"layers.{block}.bias", (1, 1)) for block in range(16)]
    ring = ParameterNodes("weight", (24, 1))
    angle = 2 * np.pi * np.arange(24) / 24
    return [
        (
            "depth: one row\nin 16 blocks",
            make_graph(layers, [torch.ones(1)] * 16, Depth(), normalized=False),
            None,
        ),
        (
            "ring: 24 rows\nof a parameter",
            make_graph([ring], [torch.ones(24)], Ring(), normalized=False),
            np.stack([np.cos(angle), np.sin(angle)], axis=1),
        ),
        (
            "similarity: 64 rows,\neach and the 4 most like it",
            similarity_graph(rows, 4, normalized=False),
            rows[:, :2].double().numpy(),
        ),
    ]


def draw_eigenvector(
    axes: Axes, graph: ParameterGraph, places: Values | None, signal: Values
) -> PathCollection:
    """Nodes coloured by an eigenvector: a curve over blocks on a path, else at their places."""
    if places is None:
        blocks = np.arange(len(signal))
        nodes = draw_signal(axes, graph, np.stack([blocks, signal], axis=1), signal)
        axes.axhline(0, color=GREY, linewidth=0.6, linestyle=":")
        axes.set_xlabel("block")
        axes.set_xticks(blocks[::5])
        axes.margins(0.05, 0.25)
        return nodes
    nodes = draw_signal(axes, graph, places, signal)
    axes.set_aspect("equal")
    axes.margins(0.08)
    axes.spines[["left", "bottom"]].set_visible(False)
    return nodes


@styled
def draw_frequencies() -> Figure:
    """Eigenvectors of a low, a middle and a high frequency on three graphs."""
    figure = new_figure(9.3, WIDE)
    grid = figure.subplots(3, 3, height_ratios=[0.6, 1, 1])
    for line, (name, graph, places) in zip(grid, example_graphs(), strict=True):
        values, vectors = np.linalg.eigh(graph.laplacian().toarray())
        low = int(np.flatnonzero(values > 1e-9)[0])
        for axes, which in zip(line, (low, len(values) // 2, -1), strict=True):
            axes.set_title(f"λ = {values[which]:.2f}", loc="center")
            nodes = draw_eigenvector(axes, graph, places, vectors[:, which])
        line[0].set_ylabel(name)
    for axes, name in zip(grid[0], ("low", "middle", "highest"), strict=True):
        axes.set_title(f"{name} frequency\n{axes.get_title()}", loc="center")
    bar = figure.colorbar(nodes, ax=grid, location="bottom", shrink=0.4, aspect=40)
    bar.set_ticks([-1, 0, 1], labels=["negative", "0", "positive"])
    bar.set_label("entry of the eigenvector at a node")
    return figure


def save(figure: Figure, path: Path) -> None:
    """A PNG of few colours, which keeps it small."""
    drawn = io.BytesIO()
    figure.savefig(drawn)
    Image.open(drawn).convert("RGB").quantize(COLORS).save(path, optimize=True)


def main() -> None:
    """Draws both figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(".github/figures"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, figure in (("responses", draw_responses()), ("frequencies", draw_frequencies())):
        path = arguments.output / f"{name}.png"
        save(figure, path)
        print(path)


if __name__ == "__main__":
    main()
