"""The graphs of a model gathered by role: of query, key and value of all blocks, and so on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spectral_ds.coactivation.graph import Coactivation
from spectral_ds.coactivation.spectrum import Spectrum, Values
from spectral_ds.graph import ParameterNodes


@dataclass(frozen=True)
class RoleSpectra:
    """The graphs of parameters that share their inputs, of all blocks and experts.

    Attributes:
        roles: that share them, in model order.
        spectra: one a graph.
        parameters: by name.
    """

    roles: tuple[str, ...]
    spectra: tuple[Spectrum, ...]
    parameters: tuple[str, ...]

    @property
    def eigenvalues(self) -> Values:
        """(k,), float64, descending: the median of the i-th largest.

        Where fewer are known than elsewhere, the others count as their mean.
        """
        most = max(len(each.values) for each in self.spectra)
        table = [
            np.append(each.values, np.full(most - len(each.values), each.rest))
            for each in self.spectra
        ]
        return np.asarray(np.median(table, axis=0))

    def holding(self, share: float) -> int | None:
        """How many directions hold this share of the activity, in the median; None: more than k."""
        found = [each.holding(share) for each in self.spectra]
        known = sorted(float("inf") if each is None else each for each in found)
        middle = known[len(known) // 2]
        return None if middle == float("inf") else int(middle)


def by_role(graphs: Coactivation, parameters: Sequence[ParameterNodes]) -> list[RoleSpectra]:
    """The graphs that some of these parameters have, in model order."""
    role_of = {parameter.name: parameter.role for parameter in parameters}
    members: dict[str, list[str]] = {}
    for name in role_of:
        if name in graphs.leaders:
            members.setdefault(graphs.leaders[name], []).append(name)
    found: dict[tuple[str, ...], tuple[list[Spectrum], list[str]]] = {}
    for leader, names in members.items():
        own = [each for each in graphs.of(leader) if each is not None]
        if own:
            roles = tuple(dict.fromkeys(role_of[name] for name in names))
            spectra, members_ = found.setdefault(roles, ([], []))
            spectra += own
            members_ += names
    return [RoleSpectra(r, tuple(spectra), tuple(names)) for r, (spectra, names) in found.items()]
