"""Figures: what is drawn is what came in, and people can read it."""

import io
import subprocess
import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import LogNorm
from matplotlib.container import BarContainer
from matplotlib.text import Text
from PIL import Image

from spectral_ds.cli.inspect import plots
from spectral_ds.cli.inspect.activity import ActivityReport, RoleActivity
from spectral_ds.cli.inspect.activity_plot import activity_figure
from spectral_ds.cli.inspect.candidates import CandidateResult
from spectral_ds.cli.inspect.graph_properties import Distribution, GraphProperties, Roughness
from spectral_ds.cli.inspect.report import GraphReport
from spectral_ds.console import figure_style
from spectral_ds.monitor import activity_figures, figures
from spectral_ds.monitor.readings import ActivityReading

ROLES = [
    "model.embed_tokens.weight",
    *(f"model.layers.*.self_attn.{x}_proj.weight" for x in "qkvo"),
    *(f"model.layers.*.mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    *(f"model.layers.*.{x}_layernorm.weight" for x in ("input", "post_attention")),
    "model.norm.weight",
]
EXPERTS = [f"layers.*.mlp.experts.{i}.gate_up_projection.lora_A.weight" for i in range(200)]


def shares(count, seed=0):
    values = np.random.default_rng(seed).random(count)
    return values / values.sum()


def powers(count, seed=0):
    return np.exp(3 * np.random.default_rng(seed).standard_normal(count))


def table(blocks, roles, spread=2.0):
    values = powers((blocks, roles)) ** (spread / 3)
    values[:, [0, -1]] = np.nan
    return values


def heat_map(values, blocks, roles):
    return figures.block_role_figure(
        values, blocks, roles, "Update to weight, by block and role", "‖Δθ‖ / ‖θ‖"
    )


def of_bands(case, bands, highest=2.0, values=shares):
    """Every figure that has frequencies, yet to be drawn."""
    edges = np.linspace(0, highest, bands + 1)
    one, other = values(bands), values(bands, 1)
    steps, energies = np.arange(0.0, 500, 10), np.stack([values(bands, s) for s in range(50)])
    made = {
        "density": lambda: figures.density_figure(one, edges, other, "heat", 1 / 3),
        "energy": lambda: figures.energy_figure(one, other, highest),
        "history": lambda: figures.energy_history_figure(steps, energies, highest),
        "signal-to-noise": lambda: figures.signal_to_noise_figure(one, other, highest),
        "gains": lambda: figures.gains_figure(one, highest, "wiener"),
    }
    return {f"{name}-{case}": draw for name, draw in made.items()}


def of_activity(case, count, values=powers):
    """Every figure of a graph of activations, yet to be drawn."""
    roles = [(f"{role}.a", f"{role}.b") for role in ROLES[1:8]]
    spectra = {each: np.sort(values(count, seed))[::-1] for seed, each in enumerate(roles)}
    names = ["others", *(f"{i}" for i in range(count - 1, 0, -1))]
    edges = np.logspace(-2, 2, 25)
    graph = ActivityReading(spectra, edges, values(25), shares(24), edges, 0.5)
    relative = replace(graph, held=None)
    one, other = values(count), values(count, 1)
    history = np.arange(3.0), np.stack([values(count, seed) for seed in range(3)])
    made = {
        "activity": lambda: activity_figures.spectrum_figure(spectra),
        "filter": lambda: activity_figures.response_figure(graph, "tikhonov"),
        "relative": lambda: activity_figures.response_figure(relative, "heat"),
        "active-energy": lambda: activity_figures.energy_figure("update", one, other, names),
        "active-history": lambda: activity_figures.energy_history_figure(*history, names),
    }
    return {f"{name}-{case}": draw for name, draw in made.items()}


def of_blocks(blocks):
    values, numbers = table(blocks, len(ROLES)), list(range(blocks))
    return {
        f"heat-map-{blocks}": lambda: heat_map(values, numbers, ROLES),
        f"perturbation-{blocks}": lambda: figures.perturbation_figure(numbers, values[:, 1]),
    }


def history(steps):
    energies = np.stack([shares(8, seed) for seed in range(len(steps))])
    return figures.energy_history_figure(np.array(steps), energies, 2.0)


VALUES = {
    "zeros": lambda count, seed=0: np.zeros(count),
    "not-finite": lambda count, seed=0: np.full(count, (np.nan, np.inf)[seed % 2]),
    "some-not-finite": lambda count, seed=0: np.where(
        np.arange(count) % 3 == seed % 3, np.nan, shares(count)
    ),
    "negative": lambda count, seed=0: -shares(count, seed),
    "tiny": lambda count, seed=0: 1e-305 * powers(count, seed),
    "huge": lambda count, seed=0: 1e290 * powers(count, seed),
    "wide": powers,
}
FIGURES = {
    **{k: v for bands in (1, 64) for k, v in of_bands(bands, bands).items()},
    **{k: v for case, f in VALUES.items() for k, v in of_bands(case, 8, values=f).items()},
    **of_bands("no-frequency", 8, highest=0.0),
    **of_bands("large-lambda", 8, highest=483.71),
    **{k: v for blocks in (1, 80) for k, v in of_blocks(blocks).items()},
    **{k: v for count in (2, 64) for k, v in of_activity(count, count).items()},
    **{
        k: v
        for case in ("zeros", "not-finite")
        for k, v in of_activity(case, 8, VALUES[case]).items()
    },
    "activity-of-experts": lambda: activity_figures.spectrum_figure(
        {(role,): powers(8) for role in EXPERTS}
    ),
    "heat-map-narrow": lambda: heat_map(table(30, len(ROLES), 0.2), range(30), ROLES),
    "heat-map-zero": lambda: heat_map(np.zeros((30, len(ROLES))), range(30), ROLES),
    "heat-map-not-finite": lambda: heat_map(np.full((30, 3), np.inf), range(30), ROLES[:3]),
    "heat-map-one": lambda: heat_map(np.ones((1, 1)), [0], ["layers.*.weight"]),
    "heat-map-experts": lambda: heat_map(table(48, 200), range(48), EXPERTS),
    "perturbation-zero": lambda: figures.perturbation_figure(range(12), np.zeros(12)),
    "perturbation-small": lambda: figures.perturbation_figure(range(12), 1e-5 * powers(12)),
    "perturbation-blank": lambda: figures.perturbation_figure([0, 3], np.array([np.nan, 1.0])),
    "history-one-step": lambda: history([70.0]),
    "history-late": lambda: history(1e6 + np.arange(50.0)),
}


def drawn_texts(figure):
    """All text that a reader sees."""
    outside = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        slack = 1e-9 * (high - low)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low - slack <= tick.get_loc() <= high + slack:
                outside |= {tick.label1, tick.label2}
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    return [text.get_text() for text in texts if text not in outside]


@pytest.mark.parametrize("case", FIGURES)
def test_a_figure_can_be_read(case):
    figure, file = FIGURES[case](), io.BytesIO()
    figure.savefig(file)
    with Image.open(file) as image:
        assert (image.format, image.width) == ("PNG", 800)
        assert 200 < image.height < 1300
    is_full = "experts" in case or "activity" in case
    assert len(file.getvalue()) < (200_000 if is_full else 80_000)
    assert pyplot.get_fignums() == []

    words = drawn_texts(figure)
    assert figure.axes[0].get_title(loc="left") in words
    assert figure.axes[1 if "signal" in case else 0].get_xlabel() in words
    assert all(axes.get_ylabel() in words for axes in figure.axes)
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if axis.get_label_text() not in ("block", "role"):
            assert len(axis.get_ticklocs()) <= 10


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


def graph_report(name, family):
    roles = {role: properties(seed) for seed, role in enumerate(ROLES)}
    return GraphReport(name, "row", "normalized", properties(), {family: properties()}, roles)


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
GRAPHS = [graph_report(f"graphs[{i}]", family) for i, family in enumerate(FAMILIES)]
CANDIDATES = [candidate_result(f"gradient similarity, rows {i}", i) for i in range(9)]
PLOTS = {
    "density": lambda: plots.role_densities(GRAPHS),
    "eigenvalues": lambda: plots.role_eigenvalues(GRAPHS),
    "degrees": lambda: plots.degree_histograms(GRAPHS),
    "roughness": lambda: plots.role_roughness(GRAPHS),
    "snr": lambda: plots.candidate_ratios(CANDIDATES),
    "activity": lambda: activity_figure([activity_report("the data"), activity_report("others")]),
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_of_inspect_can_be_read(name):
    figure = PLOTS[name]()
    figure.savefig(io.BytesIO())
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


def test_the_users_style_is_neither_used_nor_changed():
    usual = png(figures.energy_figure(shares(8), shares(8, 1), 2.0))
    with pyplot.style.context("dark_background"):
        matplotlib.rcParams["font.size"] = 30
        before = dict(matplotlib.rcParams)
        assert png(figures.energy_figure(shares(8), shares(8, 1), 2.0)) == usual
        assert dict(matplotlib.rcParams) == before


def png(figure):
    file = io.BytesIO()
    figure.savefig(file, facecolor=figure.get_facecolor())
    return file.getvalue()


@pytest.mark.usefixtures("processes")
def test_importing_the_package_does_not_import_matplotlib():
    modules = "spectral_ds.monitor.figures, spectral_ds.cli.inspect.plots"
    code = f"import sys, {modules}; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0


def bars(axes):
    """Heights, left ends and right ends, of each set of bars."""
    return [
        np.array([(b.get_height(), b.get_x(), b.get_x() + b.get_width()) for b in container]).T
        for container in axes.containers
        if isinstance(container, BarContainer)
    ]


def test_density_shows_shares_and_gains():
    share, gains = shares(16), np.linspace(1, 0.2, 16)
    edges = np.linspace(0, 3.1, 17)
    figure = figures.density_figure(share, edges, gains, "tikhonov", 0.25)
    axes, over = figure.axes
    [(heights, left, right)] = bars(axes)
    np.testing.assert_allclose(heights, share)
    np.testing.assert_allclose(left, edges[:-1])
    np.testing.assert_allclose(right, edges[1:])
    [line] = over.lines
    np.testing.assert_allclose(line.get_xdata(), (edges[:-1] + edges[1:]) / 2)
    np.testing.assert_allclose(line.get_ydata(), gains)
    assert over.get_ylabel() == "gain, tikhonov at strength 0.25"
    assert axes.get_xlim() == over.get_xlim() == (0, 3.1)
    assert axes.get_ylim()[0] == over.get_ylim()[0] == 0
    assert figure.get_supxlabel() == ""


def test_density_marks_where_the_gain_is_zero_if_it_changes_sign():
    gains = np.linspace(1, -1, 16)
    figure = figures.density_figure(shares(16), np.linspace(0, 2, 17), gains, "polynomial", 1.0)
    _, zero = figure.axes[1].lines
    assert (np.array(zero.get_ydata()) == 0).all()
    low, high = figure.axes[1].get_ylim()
    assert low < -1
    assert high > 1
    assert figure.axes[0].get_ylim()[0] == 0


def test_energy_pairs_before_and_after():
    before, after = shares(8), shares(8, 1)
    axes = figures.energy_figure(before, after, 4.0).axes[0]
    (first, left, middle), (second, begin, right) = bars(axes)
    np.testing.assert_allclose(first, before)
    np.testing.assert_allclose(second, after)
    np.testing.assert_allclose(middle, np.arange(8) / 2 + 0.25)
    np.testing.assert_allclose(begin, middle)
    assert (left > np.arange(8) / 2).all()
    assert (right < np.arange(1, 9) / 2).all()
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["before the filter", "after"]
    for handle, container in zip(legend.legend_handles, axes.containers, strict=True):
        assert handle.get_facecolor() == container[0].get_facecolor()


def test_history_shows_every_step_and_the_last_of_two():
    steps = np.array([0.0, 10, 20, 30, 20, 40])
    energies = np.stack([shares(4, seed) for seed in range(6)])
    axes = figures.energy_history_figure(steps, energies, 2.0).axes[0]
    [mesh] = axes.collections
    expected = energies[[0, 1, 4, 3, 5]]  # at 0, 10, 20, 30, 40
    np.testing.assert_allclose(mesh.get_array().reshape(4, 5), expected.T)
    corners = mesh.get_coordinates()
    np.testing.assert_allclose(corners[0, :, 0], [-5, 5, 15, 25, 35, 45])
    np.testing.assert_allclose(corners[:, 0, 1], [0, 0.5, 1, 1.5, 2])
    assert mesh.norm.vmin == 0
    assert mesh.norm.vmax == expected.max()
    assert axes.get_xlabel() == "optimizer step"


def test_signal_and_noise_are_drawn_where_they_are_known():
    signal, noise = np.array([4.0, 2.0, -0.1, 0.5]), np.array([0.5, 0.0, 0.5, 2.0])
    figure = figures.signal_to_noise_figure(signal, noise, 2.0)
    powers, ratios = figure.axes
    drawn = [patch.get_data() for patch in (*powers.patches, *ratios.patches)]
    expected = [[4, 2, np.nan, 0.5], [0.5, np.nan, 0.5, 2], [8, np.nan, np.nan, 0.25]]
    for (values, edges, _), known in zip(drawn, expected, strict=True):
        np.testing.assert_allclose(values, known)
        np.testing.assert_allclose(edges, np.linspace(0, 2, 5))
    assert powers.get_yscale() == ratios.get_yscale() == "log"
    assert powers.get_ylim() == (0.1, 10)
    assert ratios.get_ylim() == (0.1, 10)
    [total] = ratios.lines
    assert total.get_ydata()[0] == pytest.approx(6.5 / 3)
    assert "not above zero" in figure.get_supxlabel()
    assert figures.signal_to_noise_figure(noise + 1, noise + 1, 2.0).get_supxlabel() == ""


def test_gains_are_drawn_by_band():
    gains = np.array([1.5, 1.0, 0.25, -0.5])
    axes = figures.gains_figure(gains, 2.0, "whiten").axes[0]
    [(heights, left, right)] = bars(axes)
    np.testing.assert_allclose(heights, gains)
    np.testing.assert_allclose([*left, right[-1]], np.linspace(0, 2, 5))
    assert axes.get_ylim()[0] < -0.5
    assert axes.get_ylim()[1] > 1.5
    assert "whiten" in axes.get_title(loc="left")
    assert [line.get_ydata()[0] for line in axes.lines] == [1]
    small = figures.gains_figure(0.01 * gains, 2.0, "wiener").axes[0]
    assert 0.015 < small.get_ylim()[1] < 0.02
    assert len(small.lines) == 0


@pytest.mark.parametrize("spread", [0.2, 3.0])
def test_a_heat_map_shows_each_parameter_at_its_block_and_role(spread):
    values, blocks = table(30, len(ROLES), spread), list(range(2, 32))
    values[4, 3] = np.nan
    figure = heat_map(values, blocks, ROLES)
    axes, bar = figure.axes
    [mesh] = axes.collections
    shown = mesh.get_array().reshape(len(ROLES) - 2, 30)
    np.testing.assert_array_equal(shown.mask, np.isnan(values[:, 1:-1].T))
    np.testing.assert_allclose(shown.filled(np.nan), values[:, 1:-1].T)
    assert isinstance(mesh.norm, LogNorm) == (spread > 1)
    assert mesh.norm.vmax == np.nanmax(values)
    names = {t.get_position()[1]: t.get_text() for t in axes.get_yticklabels()}
    assert names[0] == "self_attn.q_proj"
    assert names[8] == "post_attention_layernorm"
    assert len(names) == len(ROLES) - 2  # neither of those outside the blocks
    assert axes.get_ylim() == (len(ROLES) - 2.5, -0.5)  # the first role is on top
    places = {t.get_position()[0]: t.get_text() for t in axes.get_xticklabels()}
    assert all(text == str(blocks[int(x)]) for x, text in places.items())
    assert len(places) >= 10
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("block", "role")
    assert bar.get_ylabel() == "‖Δθ‖ / ‖θ‖"
    assert figure.get_supxlabel().splitlines() == [
        "names begin with model.layers.*. and end in .weight",
        "blank: no such parameter, or not finite",
    ]


def test_zeros_on_a_logarithmic_heat_map_have_the_lowest_colour():
    values = np.array([[0.0, 1.0, 100.0]])
    figure = heat_map(values, [0], list("abc"))
    [mesh] = figure.axes[0].collections
    figure.canvas.draw()
    colors = mesh.get_facecolor()
    np.testing.assert_array_equal(colors[0], colors[1])
    assert figure.axes[1].get_ylim() == pytest.approx((1, 100))
    assert mesh.colorbar.extend == "min"


@pytest.mark.parametrize(
    ("roles", "short", "note"),
    [
        (["h.*.a.weight", "h.*.b.weight"], ["a", "b"], "begin with h.*. and end in .weight"),
        (["h.*.a.weight", "h.*.a.bias"], ["a.weight", "a.bias"], "begin with h.*."),
        (["h.*.a.weight", "g.*.a.weight"], ["h.*.a", "g.*.a"], "end in .weight"),
        (["layers.*"], ["*"], "begin with layers."),
        (["layers.*.weight"], ["weight"], "begin with layers.*."),
        (["weight", "bias"], ["weight", "bias"], ""),
        (["weight", "h.*.a.weight", "h.*.b.weight"], ["weight", "a", "b"], "h.*."),
        (EXPERTS[7:8], ["mlp.experts.7.g…ojection.lora_A"], "begin with layers.*."),
    ],
)
def test_names_are_shortened_by_what_they_share(roles, short, note):
    names, said = figures.shortened(roles)
    assert names == short
    assert note in said
    assert bool(note) == bool(said)


def test_the_spectrum_of_activations_has_a_line_for_roles_that_share_inputs():
    values = {("h.*.q.weight", "h.*.k.weight"): powers(12), ("h.*.o.weight",): powers(9, 1)}
    figure = activity_figures.spectrum_figure(values)
    [axes] = figure.axes
    *lines, average = axes.lines
    for line, found in zip(lines, values.values(), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, len(found) + 1))
        np.testing.assert_array_equal(line.get_ydata(), found)
    assert average.get_ydata()[0] == 1
    assert axes.get_xscale() == axes.get_yscale() == "log"
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["q and 1 more", "o"]
    assert "median over blocks; names begin with h.*." in figure.get_supxlabel()
    many = activity_figures.spectrum_figure({(role,): powers(8) for role in EXPERTS})
    assert f"{len(EXPERTS) - 14} more roles are not shown" in many.get_supxlabel()


def test_the_filter_is_drawn_over_the_activity_it_meets():
    edges, gains = np.logspace(-2, 1, 9), np.linspace(1, 0.1, 5)
    at, held = np.logspace(-2, 1, 5), shares(8)
    reading = ActivityReading({("a",): powers(3)}, at, gains, held, edges, 0.25)
    axes, over = activity_figures.response_figure(reading, "tikhonov").axes
    [(heights, left, right)] = bars(axes)
    np.testing.assert_allclose(heights, held)
    np.testing.assert_allclose([*left, right[-1]], edges)
    np.testing.assert_array_equal(over.lines[0].get_xydata(), np.stack((at, gains), axis=1))
    assert over.get_ylabel() == "gain, tikhonov at strength 0.25"
    assert axes.get_xscale() == "log"
    [alone] = activity_figures.response_figure(replace(reading, held=None), "heat").axes
    np.testing.assert_array_equal(alone.lines[0].get_ydata(), gains)
    assert "over that of what is learned" in alone.get_xlabel()


def test_energy_by_activity_is_drawn_band_by_band():
    before, after, names = shares(4), shares(4, 1), ["others", "3–4", "2", "1"]
    axes = activity_figures.energy_figure("update", before, after, names).axes[0]
    (first, _, middle), (second, begin, _) = bars(axes)
    np.testing.assert_allclose((first, second), (before, after))
    np.testing.assert_allclose(middle, np.arange(4), atol=1e-12)
    np.testing.assert_allclose(begin, np.arange(4), atol=1e-12)
    assert [text.get_text() for text in axes.get_xticklabels()] == names
    steps, energies = np.array([0.0, 10, 0]), np.stack([shares(4, seed) for seed in range(3)])
    axes = activity_figures.energy_history_figure(steps, energies, names).axes[0]
    [mesh] = axes.collections
    np.testing.assert_allclose(mesh.get_array().reshape(4, 2), energies[[2, 1]].T)
    assert [text.get_text() for text in axes.get_yticklabels()] == names


def test_perturbation_has_a_bar_a_block():
    values = powers(30)
    axes = figures.perturbation_figure(list(range(30)), values).axes[0]
    [(heights, left, right)] = bars(axes)
    np.testing.assert_allclose(heights, values)
    np.testing.assert_allclose((left + right) / 2, np.arange(30))
    assert "θ" in axes.get_ylabel()


def test_what_is_not_finite_is_said():
    blank = np.array([np.nan, np.inf, 0.5, 0.25])
    for figure in (
        figures.density_figure(blank, np.linspace(0, 2, 5), blank, "heat", 0.5),
        figures.energy_figure(blank, blank, 2.0),
        figures.energy_history_figure(np.zeros(1), blank[None], 2.0),
        figures.gains_figure(blank, 2.0, "heat"),
        figures.perturbation_figure(range(4), blank),
    ):
        assert figure.get_supxlabel() == "blank: not finite"
