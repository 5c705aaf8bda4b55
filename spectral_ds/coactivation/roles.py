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
    """

    roles: tuple[str, ...]
    spectra: tuple[Spectrum, ...]

    @property
    def eigenvalues(self) -> Values:
        """(k,), float64, descending: the median of the i-th largest, where half have one."""
        most = max(len(each.values) for each in self.spectra)
        table = np.full((len(self.spectra), most), np.nan)
        for row, each in zip(table, self.spectra, strict=True):
            row[: len(each.values)] = each.values
        common = np.isfinite(table).mean(axis=0) >= 0.5
        return np.asarray(np.nanmedian(table[:, common], axis=0))

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
            members.setdefault(graphs.leaders[name], []).append(role_of[name])
    found: dict[tuple[str, ...], list[Spectrum]] = {}
    for leader, roles in members.items():
        spectra = [each for each in graphs.of(leader) if each is not None]
        if spectra:
            found.setdefault(tuple(dict.fromkeys(roles)), []).extend(spectra)
    return [RoleSpectra(roles, tuple(spectra)) for roles, spectra in found.items()]
