"""Made-up values for figures, and what a reader sees of a figure."""

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


def bars(axes):
    """Heights, left ends and right ends, of each set of bars."""
    return [
        np.array([(b.get_height(), b.get_x(), b.get_x() + b.get_width()) for b in container]).T
        for container in axes.containers
        if isinstance(container, BarContainer)
    ]
