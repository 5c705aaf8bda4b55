"""Figures of `spectral-ds inspect`: what is drawn is what was found, and people can read it."""

import io

import numpy as np
import pytest
from figure_parts import EXPERTS, ROLES, assert_whole, bars, drawn_texts, powers, shares
from matplotlib.text import Text

from spectral_ds.cli.inspect import plots
from spectral_ds.cli.inspect.activity import ActivityReport, RoleActivity
from spectral_ds.cli.inspect.activity_plot import activity_figure
from spectral_ds.cli.inspect.candidates import CandidateResult
from spectral_ds.cli.inspect.graph_properties import Distribution, GraphProperties, Roughness
from spectral_ds.cli.inspect.report import GraphReport
from spectral_ds.console import figure_style


def properties(seed=0):
    """Of a part of a graph, as `spectral-ds inspect` has found them."""
    generator = np.random.default_rng(seed)
    distribution = Distribution(0.0, 1.0, 1.5, 4.0)
    return GraphProperties(
        nodes=100,
        edges=200,
        components=3,
        isolated=1,
        degree=distribution,
        neighbours=distribution,
        lambda_max_bound=2.0,
        lambda_max=1.5 + 0.4 * generator.random(),
        lowest_eigenvalues=None if seed == 2 else sorted(generator.random(8)),
        density=shares(32, seed).tolist(),
        degree_histogram=generator.integers(0, 50, 32).tolist(),
        roughness=Roughness(0.5, 1.0, 0.5 + generator.random()),
    )


def graph_report(name, family, first):
    """Of properties from this seed on."""
    whole = properties(first)
    roles = {role: properties(seed) for seed, role in enumerate(ROLES, first + 1)}
    return GraphReport(name, "row", "normalized", whole, {family: whole}, roles)


def candidate_result(name, seed):
    signal, noise = shares(8, seed).tolist(), shares(8, seed + 1).tolist()
    return CandidateResult(name, 10, 8, signal, noise, 0.3, 0.2, 1.5, {}, "")


def activity_report(name, gradient=(0.1, 0.2, 0.3)):
    roles = [
        RoleActivity([role], 3, 64, 4, None, powers(64, seed).tolist(), None, [0.125, 0.5, 1.0])
        for seed, role in enumerate(EXPERTS)
    ]
    shares_ = None if gradient is None else list(gradient)
    return ActivityReport(name, [8, 32, 64], roles, shares_, shares_ and [0.125, 0.5, 1.0])


def test_the_gradient_along_active_directions_is_drawn_beside_chance():
    figure = activity_figure([activity_report("the data"), activity_report("others", (0, 0.5, 1))])
    *panels, last = figure.axes
    assert [axes.get_title(loc="left").partition(" (")[0] for axes in panels] == [
        "the data",
        "others",
    ]
    np.testing.assert_allclose(panels[0].lines[0].get_ydata(), powers(64))
    heights = [100 * np.array(h) for h in ((0.1, 0.2, 0.3), (0, 0.5, 1), (0.125, 0.5, 1.0))]
    np.testing.assert_allclose([found[0] for found in bars(last)], heights)
    names = [text.get_text() for text in last.get_legend().get_texts()]
    assert names == ["the data", "others", "by chance"]
    [alone] = activity_figure([activity_report("others", None)]).axes
    assert "more roles are not shown" in alone.get_title(loc="left")


FAMILIES = "edges[0]: similarity of weights, 8 neighbours within the parameter", "edges[0]: ring"
GRAPHS = [graph_report(f"graphs[{i}]", family, 20 * i) for i, family in enumerate(FAMILIES)]
CANDIDATES = [candidate_result(f"gradient similarity, rows {i}", i) for i in range(9)]
PLOTS = {
    "density": lambda: plots.role_densities(GRAPHS),
    "eigenvalues": lambda: plots.role_eigenvalues(GRAPHS),
    "degrees": lambda: plots.degree_histograms(GRAPHS),
    "roughness": lambda: plots.role_roughness(GRAPHS),
    "snr": lambda: plots.candidate_ratios(CANDIDATES),
    "activity": lambda: activity_figure([activity_report("the data"), activity_report("others")]),
}


def panels_of(name):
    return [axes for axes in PLOTS[name]().axes if axes.get_label() != "<colorbar>"]


def test_every_role_of_every_graph_is_drawn_as_it_was_found():
    for graph, *panels in zip(
        GRAPHS, *map(panels_of, ("density", "eigenvalues", "roughness")), strict=True
    ):
        parts = [graph.whole, *graph.roles.values()]
        for axes in panels:
            assert [text.get_text() for text in axes.get_yticklabels()] == ["all", *ROLES]
            assert axes.get_ylim() == (len(parts) - 0.5, -0.5)  # the first on top
        density, eigenvalues, roughness = panels
        [picture] = density.images
        np.testing.assert_array_equal(picture.get_array(), [part.density for part in parts])
        assert tuple(picture.get_extent()) == (0, 2, len(parts) - 0.5, -0.5)
        marks = [(list(line.get_xdata()), set(line.get_ydata())) for line in eigenvalues.lines]
        assert marks[::2] == [
            (part.lowest_eigenvalues or [], {line} if part.lowest_eigenvalues else set())
            for line, part in enumerate(parts)
        ]
        assert marks[1::2] == [([part.lambda_max], {line}) for line, part in enumerate(parts)]
        widths = [bar.get_width() for bar in roughness.patches]
        assert widths == [part.roughness.ratio for part in parts]
        heights = [bar.get_y() + bar.get_height() / 2 for bar in roughness.patches]
        np.testing.assert_allclose(heights, range(len(parts)), atol=1e-12)


def test_the_degrees_of_every_graph_are_drawn_as_they_were_found():
    for axes, graph in zip(panels_of("degrees"), GRAPHS, strict=True):
        [stairs] = axes.patches
        counts, edges, _ = stairs.get_data()
        assert list(counts) == graph.whole.degree_histogram
        np.testing.assert_allclose(edges, np.linspace(0, graph.whole.degree.max, len(counts) + 1))
        [mean] = axes.lines
        assert set(mean.get_xdata()) == {graph.whole.degree.mean}


def test_the_signal_to_noise_ratio_of_each_band_is_drawn_over_that_of_all():
    [axes] = panels_of("snr")
    *lines, even = axes.lines
    assert set(even.get_ydata()) == {1}
    for line, found in zip(lines, CANDIDATES, strict=True):
        signal, noise = np.array(found.signal), np.array(found.noise)
        ratio = signal / noise / (signal.sum() / noise.sum())
        np.testing.assert_allclose(line.get_ydata(), ratio)
        np.testing.assert_allclose(line.get_xdata(), (np.arange(8) + 0.5) / 8)
        assert line.get_label() == f"{found.name} (1.50)"


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_of_inspect_can_be_read(name):
    figure = PLOTS[name]()
    figure.savefig(io.BytesIO())
    assert_whole(figure)
    words = drawn_texts(figure)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert figure.get_suptitle() in words or all(title in words for title in titles)
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert len(panels) == {"snr": 1, "activity": 3}.get(name, len(GRAPHS))
    assert all(axes.get_xlabel() in words for axes in panels)
    assert all(axes.get_ylabel() in words for axes in figure.axes)
    if name == "eigenvalues":
        [legend] = figure.legends
        marks = [(h.get_marker(), h.get_color()) for h in legend.legend_handles]
        assert marks == [("|", figure_style.BLUE), ("o", figure_style.RED)]
        assert [text.get_text() for text in legend.get_texts()] == ["lowest above 0", "largest"]
    assert min(text.get_fontsize() for text in figure.findobj(Text) if text.get_text()) >= 8
