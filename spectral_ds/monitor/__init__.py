"""What people see: scalars of each monitored step, to the engine's own monitor."""

from spectral_ds.monitor.recorder import Monitor

__all__ = ["Monitor"]
