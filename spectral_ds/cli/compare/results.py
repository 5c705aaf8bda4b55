"""Results: rows in a CSV file that grows, and is all that is needed to go on.

A row is what one model was measured to be: that of a run, of an interpolation of it, or of what a
method `after` it has made.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from spectral_ds.cli.compare.material import (
    ACCURACY,
    DIVERGENCE,
    FORGETTING,
    LOSS,
    TEST,
    VALIDATION,
    column,
)
from spectral_ds.cli.compare.settings import Comparison
from spectral_ds.cli.errors import UserError
from spectral_ds.files import write_whole

# What tells rows apart; `alpha` is the share of the change that is left.
KEY = ("task", "method", "setting", "learning_rate", "seed", "alpha")
# Of a run: seconds of training, of a step; bytes beyond the model; ‖W − W₀‖.
COST = ("seconds", "step_seconds", "memory", "perturbation")
CURVE = (*KEY[:-1], "step", "seconds", "loss")

Key: TypeAlias = tuple[str, ...]
Row: TypeAlias = dict[str, Any]


def measures_of(comparison: Comparison) -> list[str]:
    """Columns of what is measured."""
    classifies = comparison.kind == "classification"
    found = []
    for part in (VALIDATION, TEST):
        found += [column(part, LOSS)]
        found += [column(part, ACCURACY)] if classifies else []
        found += [column(part, FORGETTING)]
        found += [] if classifies else [column(part, DIVERGENCE)]
    return found + [column(TEST, FORGETTING, name) for name in comparison.general]


class Table:
    """A CSV file with rows of some columns, each written at once.

    Args:
        path: is read if it is there.
        columns: in order.
        key: those that tell rows apart.
        writes: whether rows may be added; else the file stays as it is.

    Raises:
        UserError: it has other columns.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], key: Sequence[str], writes: bool = True
    ) -> None:
        self.path, self._columns, self._key = path, list(columns), key
        self.rows: list[Row] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                lines = list(file)
            # A line that was cut when the process was stopped is measured again.
            if lines and not lines[-1].endswith("\n"):
                lines.pop()
            reader = csv.DictReader(lines)
            if list(reader.fieldnames or ()) != self._columns:
                raise UserError(f"{path}: has other columns than this comparison")
            self.rows = [_typed(row) for row in reader if None not in row.values()]
        self._known = {self._key_of(row) for row in self.rows}
        if writes:
            self._rewrite()

    def _rewrite(self) -> None:
        def write(unfinished: Path) -> None:
            with unfinished.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(map(_written, self.rows))

        write_whole(self.path, write)

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        return self._key_of(key) in self._known

    def _key_of(self, row: Mapping[str, Any]) -> Key:
        return tuple(_text(row[name]) for name in self._key)

    def add(self, rows: Iterable[Row]) -> None:
        """Write rows; those that are there already stay as they are."""
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            for row in rows:
                if row not in self:
                    self._known.add(self._key_of(row))
                    self.rows.append(row)
                    writer.writerow(_written(row))


def _written(row: Row) -> Row:
    return {name: _text(value) for name, value in row.items()}


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _typed(row: Mapping[str, str]) -> Row:
    """Numbers as numbers; names stay."""
    found: Row = {}
    for name, text in row.items():
        if name in ("task", "method", "setting"):
            found[name] = text
        elif name in ("seed", "step"):
            found[name] = int(text)
        else:
            found[name] = None if text == "" else float(text)
    return found
