"""Figures of the monitor: what is drawn is what came in."""

from dataclasses import replace

import numpy as np
import pytest
from figure_parts import EXPERTS, ROLES, bars, heat_map, powers, shares, table
from matplotlib.colors import LogNorm

from spectral_ds.monitor import activity_figures, figures
from spectral_ds.monitor.readings import ActivityReading


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
