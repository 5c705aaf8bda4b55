"""Made-up values for figures, and what a reader sees of a figure."""

from itertools import pairwise

import numpy as np
from matplotlib.container import BarContainer
from matplotlib.text import Text

from spectral_ds.monitor import figures

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


def axes_of(figure):
    return [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]


def tick_labels(axis):
    """Labels of ticks by whether they are in view."""
    scaled = axis.get_transform().transform
    low, high = np.sort(scaled(axis.get_view_interval()))
    slack = 1e-9 * (high - low)
    found = {True: [], False: []}
    for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
        in_view = low - slack <= scaled(tick.get_loc()) <= high + slack
        found[bool(in_view)] += [tick.label1, tick.label2]
    return found


def is_seen(text):
    return text.get_visible() and text.get_text().strip()


def texts_of(figure):
    """All text that a reader sees, as matplotlib has it."""
    outside = {label for axis in axes_of(figure) for label in tick_labels(axis)[False]}
    return [text for text in figure.findobj(Text) if is_seen(text) and text not in outside]


def drawn_texts(figure):
    """All text that a reader sees."""
    return [text.get_text() for text in texts_of(figure)]


def assert_whole(figure):
    """All text of a figure that has been drawn is inside, no label of a tick on the next one."""
    renderer = figure.canvas.get_renderer()
    (left, bottom), (right, top) = figure.bbox.padded(1).get_points()
    for text in texts_of(figure):
        box = text.get_window_extent(renderer)
        assert left <= box.x0 <= box.x1 <= right, (text.get_text(), box)
        assert bottom <= box.y0 <= box.y1 <= top, (text.get_text(), box)
    for axis in axes_of(figure):
        labels = [label for label in tick_labels(axis)[True] if is_seen(label)]
        boxes = [(label.get_window_extent(renderer), label.get_text()) for label in labels]
        is_x = axis.axis_name == "x"
        ends = sorted((*(box.intervalx if is_x else box.intervaly), words) for box, words in boxes)
        for (_, end, one), (start, _, other) in pairwise(ends):
            assert end <= start + 1, (one, other)


def bars(axes):
    """Heights, left ends and right ends, of each set of bars."""
    return [
        np.array([(b.get_height(), b.get_x(), b.get_x() + b.get_width()) for b in container]).T
        for container in axes.containers
        if isinstance(container, BarContainer)
    ]
