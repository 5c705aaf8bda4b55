"""Readings: what has been measured, as the board and the dashboard are given it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spectral_ds.spectrum import Density, SignalToNoise

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Energies:
    """A signal by frequency.

    Attributes:
        norm: ‖X‖, without loss scaling.
        shares: (bands,): of its energy in equal bands, lowest first.
    """

    norm: float
    shares: Values

    def metrics(self, what: str, when: str) -> dict[str, float]:
        """By name, as "gradient" or "update", "before" or "after" the filter."""
        shares = {f"band_energy_{when}/{band}": float(e) for band, e in enumerate(self.shares)}
        return {f"{what}_norm/{when}": self.norm, **shares}


@dataclass(frozen=True)
class RegularizerReading:
    """The regularization term at a step.

    Attributes:
        term: R.
        perturbation: ‖θ − θ_ref‖.
        joint_loss: task + α · R; None where no rank has observed a task loss.
        perturbation_by_block: (blocks,); None without a reference.
    """

    term: float
    perturbation: float
    joint_loss: float | None
    perturbation_by_block: Values | None

    def metrics(self) -> dict[str, float]:
        """By name."""
        found = {"regularizer": self.term, "perturbation": self.perturbation}
        return found if self.joint_loss is None else {**found, "joint_loss": self.joint_loss}


@dataclass(frozen=True)
class FilterReading:
    """The filter at a step.

    Attributes:
        strength: s.
        gains: (bins,): (1 − s) + s · h(λ) at the middles of the density's bins.
        adaptive: (bands,): the gains of an adaptive response; None for any other.
    """

    strength: float
    gains: Values
    adaptive: Values | None = None


@dataclass(frozen=True)
class GraphReading:
    """What is drawn of one graph; changes only when it is rebuilt.

    Attributes:
        density: of states.
        degrees, weights: (counts, edges) of node degree and edge weight.
    """

    density: Density
    degrees: tuple[Values, Values]
    weights: tuple[Values, Values]


@dataclass(frozen=True)
class StepReading:
    """What is drawn of one step.

    Attributes:
        what: the filtered signal, "gradient" or "update".
        before, after: (bands,): share of its energy.
        filter: what acted.
        signal_to_noise: None before the second sample.
        gradient_norms, roughness: (blocks, roles), NaN where there is no parameter; roughness of
            the filtered signal, as a share of the highest frequency.
        perturbation: ‖θ − θ_ref‖ by block; None without a reference.
    """

    what: str
    before: Values
    after: Values
    filter: FilterReading
    signal_to_noise: SignalToNoise | None
    gradient_norms: Values
    roughness: Values
    perturbation: Values | None = None
