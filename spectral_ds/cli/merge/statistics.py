"""Statistics: the graphs of inputs to keep and to learn, of a model's layers by their short names.

In: files, or what calibration has found. Out: the functions that filter the changes of a matrix.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from spectral_ds.cli.errors import UserError
from spectral_ds.coactivation import (
    Coactivation,
    Factors,
    Function,
    InputsError,
    Site,
    Spectrum,
    functions_of,
)
from spectral_ds.coactivation import file as statistics

# Functions that are kept at hand: query, key and value, gate and up have one in common.
AT_HAND = 16

# The graph of a matrix, and a name that matrices with the same inputs share.
Graph: TypeAlias = tuple[tuple[str, int], Spectrum]


class Graphs:
    """The graphs of a model's sites.

    Args:
        found: under names of any model that has this one inside.
        sites: by short name.
        of: what they are of, for messages.

    Raises:
        UserError: they are of another model.
    """

    def __init__(self, found: Coactivation, sites: Mapping[str, Site], of: str) -> None:
        self.found, self._of = found, of
        by_end: dict[str, list[str]] = {}
        for name in found.leaders:
            parts = name.split(".")
            for first in range(len(parts)):
                by_end.setdefault(".".join(parts[first:]), []).append(name)
        self._name_of: dict[str, str] = {}
        for short, site in sites.items():
            names = [short] if short in found.leaders else by_end.get(short, [])
            if len(names) > 1:
                raise UserError(f"{of}: {names[0]} and {names[1]} both may be {short}")
            if names:
                self._check(names[0], site)
                self._name_of[short] = names[0]
        if not self._name_of:
            some = ", ".join(list(found.leaders)[:2]) or "nothing"
            raise UserError(f"{of}: is of another model: it knows {some}")

    def _check(self, name: str, site: Site) -> None:
        spectra = self.found.of(name)
        inputs = {each.inputs for each in spectra if each is not None}
        if len(spectra) != site.matrices or inputs - {site.inputs}:
            raise UserError(
                f"{self._of}: has {len(spectra)} graphs of {sorted(inputs)} inputs for {name}, and "
                f"the model has {site.matrices} of {site.inputs}"
            )

    def of(self, parameter: str, matrix: int) -> Graph | None:
        """The graph of a matrix; None if nothing has entered it."""
        name = self._name_of.get(parameter)
        spectra = () if name is None else self.found.of(name)
        spectrum = spectra[matrix] if matrix < len(spectra) else None
        if name is None or spectrum is None:
            return None
        return (self.found.leaders[name], matrix), spectrum


def read(path: Path, rank: int, sites: Mapping[str, Site]) -> Graphs:
    """Statistics from a file.

    Raises:
        UserError: it is none, or of another model.
    """
    try:
        return Graphs(statistics.load(path, rank), sites, str(path))
    except InputsError as error:
        raise UserError(f"{path}: {error}") from error


class Functions:
    """What filters the change of each matrix.

    Args:
        keep: R.
        learn: T of each tuned model; None: I.
        mu: μ.
        scale: what is left of all that they leave.
    """

    def __init__(
        self, keep: Graphs, learn: Sequence[Graphs | None], mu: float, scale: float = 1.0
    ) -> None:
        self._keep, self._learn, self._mu, self._scale = keep, learn, mu, scale
        self._at_hand: OrderedDict[object, list[Factors]] = OrderedDict()

    def of(self, parameter: str, matrix: int) -> list[Factors] | None:
        """Of each model; None if nothing that is to be kept has entered the matrix."""
        keep = self._keep.of(parameter, matrix)
        if keep is None:
            return None
        learned = [None if each is None else each.of(parameter, matrix) for each in self._learn]
        key = keep[0], *(None if each is None else each[0] for each in learned)
        if key not in self._at_hand:
            spectra = [None if each is None else each[1] for each in learned]
            self._at_hand[key] = [
                Function.of(each, torch.from_numpy(each.basis)).factors(0.0, self._scale)
                for each in functions_of(keep[1], spectra, self._mu)
            ]
            if len(self._at_hand) > AT_HAND:
                self._at_hand.popitem(last=False)
        return self._at_hand[key]

    def unlearned(self, parameter: str, matrix: int) -> bool:
        """Whether a model's inputs are known in general, and none has entered this matrix."""
        return any(each is not None and each.of(parameter, matrix) is None for each in self._learn)
