"""How every figure of the package looks, and how it is made outside pyplot.

Nothing global holds such a figure, and matplotlib's settings stay as they were; matplotlib is
imported only when something is drawn.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")

# Okabe and Ito's colours, which colour-blind people can tell apart.
BLUE, RED, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE = "#56B4E9", "#CC79A7"
COLORS = (BLUE, RED, GREEN, ORANGE, SKY, PURPLE, "#000000")
GREY, BLANK = "#6E6E6E", "#E6E6E6"
# Its lightness rises evenly, for colour-blind people too.
HEAT_MAP = "viridis"
STYLE: dict[str, Any] = {
    "font.size": 12,
    "figure.titlesize": 14,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "xtick.major.pad": 6,
}
# Inches: of one plot, as TensorBoard shows it; of several side by side, or with long names.
WIDTH, WIDE = 8.0, 12.0
DPI = 100


def styled(draw: "Callable[P, Figure]") -> "Callable[P, Figure]":
    """Draw in the style of this module, whatever the user's is."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> "Figure":
        from matplotlib import style

        with style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return drawn


def new_figure(height: float, width: float = WIDTH) -> "Figure":
    """An empty figure of so many inches; to be called from a function that is `styled`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
