"""Readings: what has been measured, as the board and the dashboard are given it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spectral_ds.monitor.activity import ActivityBands
from spectral_ds.spectrum import Density, SignalToNoise

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Energies:
    """A signal by frequency.

    Attributes:
        norm: ‖X‖, without loss scaling.
        shares: (bands,): of its energy in bands, lowest first.
    """

    norm: float
    shares: Values

    @property
    def tags(self) -> Sequence[str]:
        """The name of each band in a metric."""
        return [str(band) for band in range(len(self.shares))]

    def metrics(self, what: str, when: str) -> dict[str, float]:
        """By name, as "gradient" or "update", "before" or "after" the filter."""
        pairs = zip(self.tags, self.shares.tolist(), strict=True)
        shares = {f"band_energy_{when}/{tag}": share for tag, share in pairs}
        return {f"{what}_norm/{when}": self.norm, **shares}


@dataclass(frozen=True)
class ActiveEnergies(Energies):
    """A signal by activity: `shares` are of bands of directions, the least active first.

    Attributes:
        bands: what the energy is divided into.
        along: (parameters, directions): energy along the i-th most active direction.
        total: (parameters,): energy of what has inputs.
    """

    bands: ActivityBands
    along: Values
    total: Values

    @property
    def tags(self) -> Sequence[str]:
        return self.bands.tags

    def metrics(self, what: str, when: str) -> dict[str, float]:
        """By name; only the norm where no energy is on the graph, which may not be known yet."""
        norm = {f"{what}_norm/{when}": self.norm}
        return super().metrics(what, when) if self.total.any() else norm

    def share(self, directions: int) -> float:
        """Of the energy, what goes along so many of the most active directions; NaN of none."""
        return _ratio(self.along[:, :directions].sum(), self.total.sum())

    def shares_by_parameter(self, directions: int) -> Values:
        """The same of each parameter; (parameters,), NaN where it has no inputs, or no energy."""
        has_any = self.total > 0
        along = self.along[:, :directions].sum(axis=1)
        return np.where(has_any, along / np.where(has_any, self.total, 1), np.nan)


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


@dataclass(frozen=True)
class ActivityReading:
    """What is drawn of a graph of activations.

    Attributes:
        eigenvalues: by the roles that share a graph, (k,): the median over blocks, largest first.
        frequencies, gains: (points,): (1 − s) + s · h(a), ascending.
        held: (bins,): share of all activity that directions of such a frequency hold; None where a
            frequency is of what is kept relative to what is learned.
        edges: (bins + 1,): of the bins.
        strength: s.
    """

    eigenvalues: Mapping[tuple[str, ...], Values]
    frequencies: Values
    gains: Values
    held: Values | None
    edges: Values
    strength: float


@dataclass(frozen=True)
class ActivityStep:
    """What is drawn of one step on a graph of activations.

    Attributes:
        what: the filtered signal, "gradient" or "update".
        directions: the most active ones that tables are of.
        before, after: its energy.
        gradient_norms: (blocks, roles), NaN where there is no parameter.
        along_before, along_after: (blocks, roles): share along the most active directions.
        perturbation: ‖θ − θ_ref‖ by block; None without a reference.
    """

    what: str
    directions: int
    before: ActiveEnergies
    after: ActiveEnergies
    gradient_norms: Values
    along_before: Values
    along_after: Values
    perturbation: Values | None = None


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else float("nan")
