"""What people see: scalars of each monitored step, to the engine's own monitor."""

from spectral_ds.monitor.recorder import Monitor
from spectral_ds.monitor.verdict import ENOUGH_SAMPLES, verdict

__all__ = ["ENOUGH_SAMPLES", "Monitor", "verdict"]
