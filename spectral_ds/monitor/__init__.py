"""What people see: scalars of each monitored step, histograms and figures, to TensorBoard."""

from spectral_ds.monitor.board import Board
from spectral_ds.monitor.dashboard import Dashboard
from spectral_ds.monitor.monitor import Monitor
from spectral_ds.monitor.norms import ParameterNorms
from spectral_ds.monitor.readings import FilterReading, GraphReading, StepReading
from spectral_ds.monitor.verdict import TOO_NOISY, verdict

__all__ = [
    "TOO_NOISY",
    "Board",
    "Dashboard",
    "FilterReading",
    "GraphReading",
    "Monitor",
    "ParameterNorms",
    "StepReading",
    "verdict",
]
