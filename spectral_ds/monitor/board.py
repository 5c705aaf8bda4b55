"""Board: where scalars, histograms and figures go, and how TensorBoard lays the charts out."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from spectral_ds.engines import Engine
from spectral_ds.monitor.folders import writer_of_its_own

# By title, what the tags of a chart begin with.
Charts: TypeAlias = Mapping[str, tuple[str, ...]]

PREFIX = "spectral_ds"
FIGURE_DPI = 100


class Board:
    """Writes to the engine's own monitor, or to a TensorBoard writer; rank 0 writes.

    Args:
        write_scalars: takes scalars by name.
        writer: a `SummaryWriter` for histograms and figures; None on other ranks and without
            TensorBoard.
        step: gives the number under which TensorBoard files what is written now.
        is_open: whether rank 0 has a writer; equal on all ranks.
        own_writer: a writer to close in the end; None: none is the board's own.
        is_kept: whether `write_scalars` writes, on rank 0.
    """

    def __init__(
        self,
        write_scalars: Callable[[Mapping[str, float]], None],
        writer: Any,
        step: Callable[[], int],
        is_open: bool,
        own_writer: Any = None,
        is_kept: bool = True,
    ) -> None:
        self.is_open, self.is_kept = is_open, is_kept
        self._own_writer = own_writer
        self._write_scalars = write_scalars
        self._writer = writer
        self._step = step
        self._tags: set[str] = set()  # of scalars so far
        self._charts: dict[str, Any] = {}

    @classmethod
    def open(cls, engine: Engine, folder: str, is_enabled: bool, writer: Any = None) -> "Board":
        """A board on the engine's own monitor, or on a writer of its own (collective).

        Args:
            folder: for TensorBoard files; "": where the engine writes. See `writer_of_its_own`.
            is_enabled: whether anything is going to be written.
            writer: the user's `SummaryWriter` on rank 0; None: there is none.

        Raises:
            SpectralConfigError: rank 0 cannot write to the folder; on all ranks.
        """
        is_first, own_writer = engine.everyone.rank == 0, None
        with engine.everyone.all_or_none():
            if folder and is_enabled and is_first and writer is None:
                writer = own_writer = writer_of_its_own(folder, engine.optimizer)
                if (own := own_writer.log_dir) != folder:
                    engine.log(f"{folder} has curves of another optimizer; these go to {own}")
        writer = writer if is_first else None
        if engine.everyone.maximum(float(writer is not None)) > 0:

            def write(metrics: Mapping[str, float]) -> None:
                if writer is not None:
                    for name, value in metrics.items():
                        writer.add_scalar(f"{PREFIX}/{name}", value, engine.board_step)

            return cls(write, writer, lambda: engine.board_step, True, own_writer)
        monitor = engine.monitor
        writer = None if monitor is None else monitor.summary_writer
        is_open = engine.everyone.maximum(float(writer is not None)) > 0

        def write_to_monitor(metrics: Mapping[str, float]) -> None:
            if monitor is not None:
                monitor.write(metrics)

        is_kept = monitor is not None
        return cls(write_to_monitor, writer, lambda: engine.board_step, is_open, is_kept=is_kept)

    def close(self) -> None:
        """Close the writer, if it is the board's own."""
        if self._own_writer is not None:
            self._own_writer.close()

    def scalars(self, metrics: Mapping[str, float]) -> None:
        """Write numbers by name, but none that is not finite, as where gradients overflow."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._tags |= finite.keys()
        self._write_scalars(finite)
        self.flush()

    def figure(self, name: str, make: Callable[[], Any]) -> None:
        """Draw a figure, where there is a writer."""
        if self._writer is not None:
            self._writer.add_figure(f"{PREFIX}/{name}", make(), self._step(), close=False)

    def histogram(
        self, name: str, counts: npt.NDArray[np.float64], edges: npt.NDArray[np.float64]
    ) -> None:
        """Write counted values: (bins,) of bins with (bins + 1,) edges."""
        if self._writer is None or counts.sum() == 0:
            return
        middles = (edges[:-1] + edges[1:]) / 2
        self._writer.add_histogram_raw(
            f"{PREFIX}/{name}",
            min=float(edges[:-1][counts > 0].min()),
            max=float(edges[1:][counts > 0].max()),
            num=int(counts.sum()),
            sum=float(counts @ middles),
            sum_squares=float(counts @ middles**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=self._step(),
        )

    def lay_out(self, of_graph: Charts) -> None:
        """Put the charts that belong together side by side, again when there are new ones.

        Args:
            of_graph: the charts of what is measured on the graph.
        """
        if self._writer is None:
            return
        charts: dict[str, Any] = {}
        known = sorted(self._tags)
        for title, starts in {
            "norm before and after the filter": ("gradient_norm/", "update_norm/"),
            **of_graph,
            "update to weight by block": ("update_to_weight_by_block/",),
            "update to weight by role": ("update_to_weight_by_role/",),
            "gradient norm by block": ("gradient_norm_by_block/",),
            "gradient norm by role": ("gradient_norm_by_role/",),
            "parameter norm by block": ("parameter_norm_by_block/",),
            "parameter norm by role": ("parameter_norm_by_role/",),
            "regularizer": ("regularizer", "perturbation", "joint_loss"),
        }.items():
            held = [f"{PREFIX}/{tag}" for tag in known if tag.startswith(starts)]
            if held:
                charts[title] = ["Multiline", held]
        if charts != self._charts:
            self._charts = charts
            self._writer.add_custom_scalars({PREFIX: charts})
            self.flush()

    def flush(self) -> None:
        """Make what was written visible to readers."""
        if self._writer is not None:
            self._writer.flush()
