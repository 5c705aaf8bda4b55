"""The colours of figures: people who see them otherwise can tell them apart too."""

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb

from spectral_ds.console import figure_style

# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision
# deficiency" (2009): without one kind of cone, on linear RGB.
SIGHT = {
    "usual": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def lab(rgb, sight):
    """CIELAB of sRGB colours as somebody sees them; (..., 3)."""
    rgb = np.asarray(rgb)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.transpose(SIGHT[sight]), 0, 1)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = np.moveaxis(linear @ to_xyz.T / to_xyz.sum(1), -1, 0)
    x, y, z = (np.where(c > 0.008856, np.cbrt(c), 7.787 * c + 16 / 116) for c in (x, y, z))
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_can_be_told_apart(sight):
    together = [
        (figure_style.BLUE, figure_style.ORANGE),
        (figure_style.SKY, figure_style.RED),
        (figure_style.BLUE, figure_style.RED),
        *(
            (c, "white")
            for c in (figure_style.BLUE, figure_style.SKY, figure_style.ORANGE, figure_style.RED)
        ),
    ]
    for pair in together:
        one, other = lab([to_rgb(color) for color in pair], sight)
        assert np.linalg.norm(one - other) > 30, pair  # about 2 can just be told apart


@pytest.mark.parametrize("sight", SIGHT)
def test_the_heat_maps_lightness_rises_and_blank_is_none_of_its_colours(sight):
    colors = lab(colormaps[figure_style.HEAT_MAP](np.linspace(0, 1, 64))[:, :3], sight)
    steps = np.diff(colors[:, 0])
    assert (steps > 0).all()
    assert steps.max() < 3 * steps.mean()
    blank = lab(to_rgb(figure_style.BLANK), sight)
    assert np.linalg.norm(colors - blank, axis=1).min() > 20
