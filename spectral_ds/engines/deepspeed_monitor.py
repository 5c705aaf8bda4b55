"""DeepSpeed's own monitor, such as TensorBoard or CSV files, as an `EngineMonitor`."""

from collections.abc import Mapping
from typing import Any


class DeepSpeedMonitor:
    """Writes to the monitor of a DeepSpeed engine, which itself writes on rank 0 only.

    Args:
        engine: the user's engine, whose monitor is enabled.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    @property
    def summary_writer(self) -> Any:
        return getattr(self._engine.monitor.tb_monitor, "summary_writer", None)

    def write(self, metrics: Mapping[str, float]) -> None:
        step = board_step_of(self._engine)
        self._engine.monitor.write_events(
            [(f"spectral_ds/{name}", value, step) for name, value in metrics.items()]
        )


def board_step_of(engine: Any) -> int:
    """Where DeepSpeed files its own scalars of this step, after having counted its samples."""
    return int(engine.global_samples + engine.train_batch_size())
