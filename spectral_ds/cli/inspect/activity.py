"""Which directions of a layer's inputs are active, and how much of the gradient goes along them.

In: activations of some inputs, and gradients of a text that these inputs are no part of. Out:
`ActivityReport`. What a filter by activity is worth shows in what a model forgets, which takes a
training; here is only what it would act on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.cli.inspect.model_under_test import ModelUnderTest
from spectral_ds.coactivation import (
    Coactivation,
    Factors,
    Held,
    Key,
    RoleSpectra,
    SubspaceOperator,
    by_role,
)
from spectral_ds.graph import ParameterNodes
from spectral_ds.monitor.activity import TOLD, percent
from spectral_ds.sharding import Signal

Values = npt.NDArray[np.float64]

# Inputs that --data has looked at.
RANDOM, DATA = "random tokens", "the data"
# Directions that are looked at, and the most active ones that shares are of.
RANK, DIRECTIONS = 128, (8, 32, 64)
HALF, MOST = 0.5, 0.9


@dataclass(frozen=True)
class RoleActivity:
    """The graphs of parameters that share their inputs, of all blocks.

    Attributes:
        roles: that share them.
        graphs: how many there are.
        inputs: of one.
        holding_half, holding_most: directions that hold 50 and 90 % of the activity; None: more
            than are known.
        eigenvalues: known ones, largest first: the median over graphs; 1 is average.
        gradient: shares of its energy along the 8, 32 and 64 most active directions; None where
            there is none.
        by_chance: the same of a gradient that points anywhere.
    """

    roles: list[str]
    graphs: int
    inputs: int
    holding_half: int | None
    holding_most: int | None
    eigenvalues: list[float]
    gradient: list[float] | None
    by_chance: list[float]


@dataclass(frozen=True)
class ActivityReport:
    """The activity of some inputs.

    Attributes:
        name: of the inputs.
        directions: that shares are of.
        roles: in model order.
        gradient, by_chance: of all roles, weighted by the gradient's energy; None without data.
    """

    name: str
    directions: list[int]
    roles: list[RoleActivity]
    gradient: list[float] | None
    by_chance: list[float] | None


class ActivityMeasurement:
    """Measures gradients on the graphs of some inputs.

    Args:
        name: of the inputs.
        model: whose gradients are measured.
        parameters: that multiply activations.
        graphs: of the inputs.
    """

    def __init__(
        self,
        name: str,
        model: ModelUnderTest,
        parameters: Sequence[ParameterNodes],
        graphs: Coactivation,
    ) -> None:
        self.name, self._parameters, self._graphs = name, parameters, graphs
        most = max(DIRECTIONS)
        factors: dict[Key, Factors] = {}
        graph_of: dict[Key, Key] = {}
        for parameter in parameters:
            leader = graphs.leaders.get(parameter.name, parameter.name)
            for matrix, spectrum in enumerate(graphs.of(parameter.name)):
                if spectrum is not None:
                    basis = torch.from_numpy(np.ascontiguousarray(spectrum.vectors[:, :most]))
                    factors[leader, matrix] = Factors(0.0, basis, torch.empty(0))
                    graph_of[parameter.name, matrix] = leader, matrix
        communicator = model.communicator
        operator = SubspaceOperator(parameters, model.layout, communicator, most)
        self._held = Held(operator, graph_of, (), communicator.device)
        self._factors_of = self._held.factors_of(factors)
        # By parameter: energy along the i-th most active direction, and in all.
        self._energy = {p.name: np.zeros(most + 1) for p in parameters}

    def observe(self, gradients: Signal) -> None:
        """Measure one gradient."""
        found = self._held.operator.measure(gradients, None, self._factors_of)
        for (name, _), energy in found.items():
            along = energy.directions.numpy()
            self._energy[name][: len(along)] += along
            self._energy[name][-1] += float(energy.total)

    def report(self) -> ActivityReport:
        """What was measured so far."""
        gathered = by_role(self._graphs, self._parameters)
        energies = [
            np.sum([self._energy[name] for name in each.parameters], axis=0) for each in gathered
        ]
        roles = [_of_role(*both) for both in zip(gathered, energies, strict=True)]
        total, gradient, chance = sum(energy[-1] for energy in energies), None, None
        if total > 0:
            gradient = _shares(np.sum(energies, axis=0))
            pairs = list(zip(energies, roles, strict=True))
            chance = [
                float(sum(energy[-1] * role.by_chance[at] for energy, role in pairs) / total)
                for at in range(len(DIRECTIONS))
            ]
        return ActivityReport(self.name, list(DIRECTIONS), roles, gradient, chance)


def _of_role(found: RoleSpectra, energy: Values) -> RoleActivity:
    inputs = found.spectra[0].inputs
    known = int(np.median([len(each.values) for each in found.spectra]))
    return RoleActivity(
        roles=list(found.roles),
        graphs=len(found.spectra),
        inputs=inputs,
        holding_half=found.holding(HALF),
        holding_most=found.holding(MOST),
        eigenvalues=found.eigenvalues.tolist(),
        gradient=_shares(energy) if energy[-1] > 0 else None,
        by_chance=[min(k, known) / inputs for k in DIRECTIONS],
    )


def _shares(energy: Values) -> list[float]:
    """Of the energy, what goes along so many of the most active directions."""
    return [float(energy[:k].sum() / energy[-1]) for k in DIRECTIONS]


def said_of_activity(reports: Sequence[ActivityReport]) -> str | None:
    """One sentence on what was found with data; None without."""
    named = {report.name: report for report in reports if report.gradient is not None}
    random, data = named.get(RANDOM), named.get(DATA)
    if random is None or data is None:
        return None
    assert random.gradient is not None, "as chosen"
    assert data.gradient is not None, "as chosen"
    assert data.by_chance is not None, "with the gradient"
    # Of small layers, fewer: 32 of 40 directions would tell nothing.
    at = DIRECTIONS.index(TOLD) if data.by_chance[DIRECTIONS.index(TOLD)] < HALF else 0
    return (
        f"{percent(random.gradient[at])} of the gradient goes along the {DIRECTIONS[at]} "
        f"directions of each layer's inputs that random tokens use most, "
        f"{percent(data.gradient[at])} along those that the data uses most "
        f"(by chance {percent(data.by_chance[at])}): a step along directions that every input "
        "uses changes what the model does with all inputs; a graph of family activations damps "
        "that part"
    )
