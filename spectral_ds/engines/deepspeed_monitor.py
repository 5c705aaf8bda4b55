"""DeepSpeed's own monitor, such as TensorBoard or CSV files, as an `EngineMonitor`."""

from collections.abc import Callable, Mapping
from typing import Any


class DeepSpeedMonitor:
    """Writes to the monitor of a DeepSpeed engine, which itself writes on rank 0 only.

    Args:
        engine: the user's engine, whose monitor is enabled.
        board_step: where it files scalars now.
    """

    def __init__(self, engine: Any, board_step: Callable[[], int]) -> None:
        self._engine, self._board_step = engine, board_step

    @property
    def summary_writer(self) -> Any:
        return getattr(self._engine.monitor.tb_monitor, "summary_writer", None)

    def write(self, metrics: Mapping[str, float]) -> None:
        step = self._board_step()
        self._engine.monitor.write_events(
            [(f"spectral_ds/{name}", value, step) for name, value in metrics.items()]
        )
