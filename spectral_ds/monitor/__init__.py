"""What people see: scalars of each monitored step, histograms and figures, to TensorBoard."""

from spectral_ds.monitor.board import Board
from spectral_ds.monitor.dashboard import Dashboard, GraphFacts, StepFacts
from spectral_ds.monitor.norms import ParameterNorms
from spectral_ds.monitor.recorder import Monitor
from spectral_ds.monitor.verdict import (
    ENOUGH_SAMPLES,
    FEWEST_SAMPLES,
    TOO_NOISY,
    judged_gains,
    verdict,
)

__all__ = [
    "ENOUGH_SAMPLES",
    "FEWEST_SAMPLES",
    "TOO_NOISY",
    "Board",
    "Dashboard",
    "GraphFacts",
    "Monitor",
    "ParameterNorms",
    "StepFacts",
    "judged_gains",
    "verdict",
]
