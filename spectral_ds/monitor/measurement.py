"""Measurement: what is measured on the first graph of a stack, and drawn, whatever its kind.

`GraphMeasurement` is for graphs of edges, `CoactivationMeasurement` for those of activations.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar

from spectral_ds.monitor.board import Charts
from spectral_ds.monitor.dashboard import Dashboard
from spectral_ds.monitor.readings import Energies, Values
from spectral_ds.sharding import Signal

Filtered = Literal["gradient", "update"]
E = TypeVar("E", bound=Energies)


@dataclass(frozen=True)
class MonitoredStep(Generic[E]):
    """A step that is monitored, once its signal is filtered.

    Attributes:
        number: of the optimizer step.
        what: the signal that was filtered.
        signal: as it is now.
        before, after: its energy.
        gradient_norms: (blocks, roles), NaN where there is no parameter.
        perturbation: ‖θ − θ_ref‖ by block; None without a reference.
    """

    number: int
    what: Filtered
    signal: Signal
    before: E
    after: E
    gradient_norms: Values
    perturbation: Values | None


class Measurement(ABC, Generic[E]):
    """What the monitor asks of a graph. All methods but the last may be collective.

    Attributes:
        charts: of its metrics.
    """

    charts: ClassVar[Charts]

    @abstractmethod
    def energies(self, signal: Signal, norm: float) -> E:
        """A signal by frequency (collective).

        Args:
            norm: ‖X‖, without loss scaling.
        """

    @abstractmethod
    def before_rebuild(self, step: int) -> None:
        """Look at a graph that may be about to be rebuilt (collective)."""

    @abstractmethod
    def metrics(self, step: MonitoredStep[E]) -> dict[str, float]:
        """What is known of the graph at a step, by name (collective)."""

    @abstractmethod
    def draw(self, step: MonitoredStep[E], dashboard: Dashboard) -> None:
        """Draw the figures of a step (collective)."""
