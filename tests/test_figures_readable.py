"""People can read every figure, whatever values come in and whatever style they use."""

import io
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from figure_parts import (
    EXPERTS,
    ROLES,
    assert_whole,
    axes_of,
    drawn_texts,
    heat_map,
    powers,
    shares,
    table,
)
from matplotlib import pyplot
from PIL import Image

from spectral_ds.monitor import activity_figures, figures
from spectral_ds.monitor.readings import ActivityReading


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

    assert_whole(figure)
    words = drawn_texts(figure)
    assert figure.axes[0].get_title(loc="left") in words
    assert figure.axes[1 if "signal" in case else 0].get_xlabel() in words
    assert all(axes.get_ylabel() in words for axes in figure.axes)
    for axis in axes_of(figure):
        if axis.get_label_text() not in ("block", "role"):
            assert len(axis.get_ticklocs()) <= 10


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
