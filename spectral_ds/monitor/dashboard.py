"""Dashboard: the histograms and figures of TensorBoard, drawn from small statistics."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from spectral_ds.monitor import activity_figures, figures
from spectral_ds.monitor.board import Board
from spectral_ds.monitor.readings import ActivityReading, ActivityStep, GraphReading, StepReading

Values = npt.NDArray[np.float64]

# Steps in the heat map over training time.
MOST_COLUMNS = 512


@dataclass
class Dashboard:
    """Draws what has been measured.

    Attributes:
        board: where to.
        response: name of the filter's response.
        blocks, roles: of the heat maps.
        interval: steps between figures, which wait for the next monitored step.
    """

    board: Board
    response: str
    blocks: Sequence[int]
    roles: Sequence[str]
    interval: int
    _history: list[tuple[int, Values]] = field(default_factory=list)
    _recorded: int = 0
    _stride: int = 1  # of the recorded steps that are kept

    def is_due(self, step: int, monitored: int) -> bool:
        """Whether a monitored step is the first at or after a multiple of `interval`.

        Args:
            step: the monitored one.
            monitored: steps between monitored steps.
        """
        is_first = step // self.interval != (step - monitored) // self.interval
        return self.board.is_open and is_first

    def record(self, step: int, before: Values) -> None:
        """Keep a monitored step for the heat map over training time.

        Of a long run every second, then every fourth, and so on: a picture shows no more. Nothing
        is kept of one without any energy, as while the graph is not known.
        """
        if not (self.board.is_open and np.isfinite(before).all() and before.any()):
            return
        if self._recorded % self._stride == 0:
            self._history.append((step, before))
        self._recorded += 1
        if len(self._history) > MOST_COLUMNS:
            del self._history[1::2]
            self._stride *= 2

    def show_graph(self, graph: GraphReading) -> None:
        """Histograms of a new graph."""
        self.board.histogram("node_degree", *graph.degrees)
        self.board.histogram("edge_weight", *graph.weights)

    def show(self, step: StepReading, graph: GraphReading) -> None:
        """All figures of one step on a graph of edges."""
        density, acting, draw = graph.density, step.filter, self.board.figure
        highest = float(density.edges[-1])
        draw(
            "density_of_states",
            lambda: figures.density_figure(
                density.share, density.edges, acting.gains, self.response, acting.strength
            ),
        )
        draw("energy", lambda: figures.energy_figure(step.before, step.after, highest))
        if self._history:
            history = self._stacked_history()
            draw("energy_over_time", lambda: figures.energy_history_figure(*history, highest))
        found = step.signal_to_noise
        if found is not None:
            draw(
                "signal_to_noise",
                lambda: figures.signal_to_noise_figure(found.signal, found.noise, highest),
            )
        adaptive = acting.adaptive
        if adaptive is not None:
            draw("gains", lambda: figures.gains_figure(adaptive, highest, self.response))
        self._draw_table(
            f"Roughness of the filtered {step.what} by block and role",
            "share of the highest frequency",
            step.roughness,
        )
        self._draw_any(step.gradient_norms, step.perturbation)

    def show_activity(self, step: ActivityStep, graph: ActivityReading | None) -> None:
        """All figures of one step on a graph of activations.

        Args:
            graph: None until it is known.
        """
        draw, names = self.board.figure, step.before.bands.names
        if graph is not None:
            draw("activity", lambda: activity_figures.spectrum_figure(graph.eigenvalues))
            draw("filter", lambda: activity_figures.response_figure(graph, self.response))
            draw(
                "energy",
                lambda: activity_figures.energy_figure(
                    step.what, step.before.shares, step.after.shares, names
                ),
            )
            if self._history:
                history = self._stacked_history()
                draw(
                    "energy_over_time",
                    lambda: activity_figures.energy_history_figure(*history, names),
                )
            label = f"share along the {step.directions} most active directions"
            for what, table in (
                (step.what, step.along_before),
                (f"filtered {step.what}", step.along_after),
            ):
                title = f"Active share of the {what} by block and role"
                self._draw_table(title, label, table)
        self._draw_any(step.gradient_norms, step.perturbation)

    def _draw_any(self, gradient_norms: Values, moved: Values | None) -> None:
        """The figures that know no graph."""
        self._draw_table("Gradient norm by block and role", "gradient norm", gradient_norms)
        if moved is not None and moved.size:
            self.board.figure(
                "perturbation_by_block", lambda: figures.perturbation_figure(self.blocks, moved)
            )
        self.board.flush()

    def _stacked_history(self) -> tuple[Values, Values]:
        """(T,) steps and (T, bands) energies."""
        steps, energies = zip(*self._history, strict=True)
        return np.array(steps), np.array(energies)

    def _draw_table(self, title: str, label: str, table: Values) -> None:
        if table.size:
            self.board.figure(
                title.lower().replace(" ", "_"),
                lambda: figures.block_role_figure(table, self.blocks, self.roles, title, label),
            )
