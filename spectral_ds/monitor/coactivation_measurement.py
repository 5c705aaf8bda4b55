"""What is measured on a graph of activations: how much of a step goes along active directions."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.coactivation import Spectrum, by_role, responses_within
from spectral_ds.config import SpectralConfig
from spectral_ds.engines import Engine
from spectral_ds.filters import StrengthSchedule
from spectral_ds.monitor.activity import TOLD, ActivityBands, said_of_energy
from spectral_ds.monitor.board import Charts
from spectral_ds.monitor.dashboard import Dashboard
from spectral_ds.monitor.measurement import Measurement, MonitoredStep
from spectral_ds.monitor.norms import ParameterNorms
from spectral_ds.monitor.readings import ActiveEnergies, ActivityReading, ActivityStep
from spectral_ds.sharding import Signal
from spectral_ds.stack import CoactivationGraph

Values = npt.NDArray[np.float64]

# Of the response: points, bins of activity, and the least frequency that is drawn.
POINTS, BINS, LOWEST = 200, 24, 1e-2


class CoactivationMeasurement(Measurement[ActiveEnergies]):
    """Measures signals on the co-activation graphs of a model's layers.

    Args:
        engine, config: of the plugin.
        graph: what is measured on.
        schedule: the strength of the filter at each step.
        norms: of all parameters.
    """

    charts: ClassVar[Charts] = {
        "energy along active directions": ("active_energy/", "most_active_energy/"),
        "energy by activity (lowest number: most active), before": ("band_energy_before/",),
        "energy by activity (lowest number: most active), after": ("band_energy_after/",),
    }

    def __init__(
        self,
        engine: Engine,
        config: SpectralConfig,
        graph: CoactivationGraph,
        schedule: StrengthSchedule,
        norms: ParameterNorms,
    ) -> None:
        self._engine, self._graph, self._schedule, self._norms = engine, graph, schedule, norms
        self._bands = ActivityBands(graph.rank, config.monitor.bands)
        self._told = min(TOLD, graph.rank)
        self._has_said = False

    def energies(self, signal: Signal, norm: float) -> ActiveEnergies:
        """A signal by activity (collective)."""
        rank, communicator = self._graph.rank, self._engine.communicator
        position = {name: number for number, name in enumerate(self._norms.names)}
        shape, device = (len(position), rank + 1), communicator.device
        own = torch.zeros(shape, dtype=torch.float64, device=device)
        for (name, _), energy in self._graph.energies(signal).items():
            row = own[position[name]]
            row[: len(energy.directions)] += energy.directions
            row[-1] += energy.total
        summed = communicator.sum_(own).cpu().numpy()
        along, total = summed[:, :-1], summed[:, -1]
        shares = self._bands.shares(along.sum(axis=0), float(total.sum()))
        return ActiveEnergies(norm, shares, self._bands, along, total)

    def before_rebuild(self, step: int) -> None:
        """Nothing is judged."""

    def metrics(self, step: MonitoredStep[ActiveEnergies]) -> dict[str, float]:
        """Shares along active directions; nothing until the graph is known, nor of NaN."""
        total = step.before.total
        if not (total.any() and np.isfinite(total).all()):
            return {}
        self._say(step)
        found = {}
        for name, directions in {
            "active_energy": self._graph.rank,
            "most_active_energy": self._told,
        }.items():
            found[f"{name}/before"] = step.before.share(directions)
            found[f"{name}/after"] = step.after.share(directions)
            found[f"{name}/by_chance"] = self.by_chance(step.before.total, directions)
        return found

    def by_chance(self, total: Values, directions: int) -> float:
        """The share along the most active directions of signals that point anywhere.

        Args:
            total: (parameters,): their energy.
        """
        keep, expected = self._graph.keep, np.zeros(len(total))
        for number, name in enumerate(self._norms.names if keep is not None else ()):
            assert keep is not None, "there are no names otherwise"
            known = [each for each in keep.of(name) if each is not None]
            if known:
                parts = [min(directions, len(each.values)) / each.inputs for each in known]
                expected[number] = np.mean(parts)
        return float(expected @ total / total.sum())

    def draw(self, step: MonitoredStep[ActiveEnergies], dashboard: Dashboard) -> None:
        """Draw the figures of a step."""
        table, told = self._norms.by_block_and_role, self._told
        reading = ActivityStep(
            step.what,
            told,
            step.before,
            step.after,
            gradient_norms=step.gradient_norms,
            along_before=table(step.before.shares_by_parameter(told)),
            along_after=table(step.after.shares_by_parameter(told)),
            perturbation=step.perturbation,
        )
        dashboard.show_activity(reading, self.reading(step.number))

    def reading(self, step: int) -> ActivityReading | None:
        """The graph and its filter at a step; None until it is known."""
        graph = self._graph
        if graph.keep is None or not (spectra := graph.keep.all_spectra()):
            return None
        strength = self._strength(step)
        response = responses_within(graph.filter.transfer, graph.lambda_max)
        lowest = min(LOWEST, *(spectrum.rest or LOWEST for spectrum in spectra))
        highest = max(graph.lambda_max, 1 / LOWEST) if graph.is_relative else graph.lambda_max
        ends = float(np.log10(lowest)), float(np.log10(highest))
        frequencies, edges = np.logspace(*ends, POINTS), np.logspace(*ends, BINS + 1)
        gathered = by_role(graph.keep, graph.parameters)
        return ActivityReading(
            {each.roles: each.eigenvalues for each in gathered},
            frequencies,
            1 + strength * (response(frequencies) - 1),
            None if graph.is_relative else _held(spectra, edges),
            edges,
            strength,
        )

    def _say(self, step: MonitoredStep[ActiveEnergies]) -> None:
        """Say once how much of a step goes along active directions, and what the filter leaves."""
        if self._has_said or not self._graph.is_ready:
            return
        acts, strength = self._acts(), self._schedule.at(step.number)
        if acts and (step.number < self._schedule.warmup_steps or strength == 0):
            return
        self._has_said = True
        told = self._told
        self._engine.log(
            said_of_energy(
                step.what,
                told,
                step.before.share(told),
                self.by_chance(step.before.total, told),
                step.after.share(told) if acts else None,
                strength,
            )
        )

    def _acts(self) -> bool:
        """Whether the filter ever changes what goes along which direction."""
        return self._schedule.strength > 0 and not self._graph.filter.transfer.is_identity

    def _strength(self, step: int) -> float:
        """s of the last step that was to be filtered; 0 until all is known."""
        strength = self._schedule.at(step - step % self._schedule.interval)
        return strength if self._graph.filter.is_ready else 0.0


def _held(spectra: Sequence[Spectrum], edges: Values) -> Values:
    """Share of all activity in each bin; (bins,)."""
    held = np.zeros(len(edges) - 1)
    for spectrum in spectra:
        others = spectrum.rest * (spectrum.inputs - len(spectrum.values))
        at = np.clip([*spectrum.values, spectrum.rest], edges[0], edges[-1])
        held += np.histogram(at, edges, weights=[*spectrum.values, others])[0]
    return np.asarray(held / max(sum(spectrum.inputs for spectrum in spectra), 1))
