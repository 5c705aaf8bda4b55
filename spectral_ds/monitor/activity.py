"""Activity in words and bands: how directions are gathered, named and told to people."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

# What people are told of: so many of the most active directions of a layer.
TOLD = 32


@dataclass(frozen=True)
class ActivityBands:
    """Bands of directions: the most active one, those after it in growing numbers, all others.

    With seven bands or more for 64 directions: 1, 2, 3 to 4, 5 to 8 and so on.

    Attributes:
        rank: directions that are known.
        most: bands at most, at least 2.
    """

    rank: int
    most: int

    @cached_property
    def edges(self) -> tuple[int, ...]:
        """Numbers of directions before each band begins, and `rank`; the most active first."""
        if self.most == 2:
            return 0, self.rank
        factor = next(f for f in range(2, self.rank + 3) if f ** (self.most - 2) >= self.rank)
        powers = (min(factor**power, self.rank) for power in range(self.most - 1))
        return tuple(dict.fromkeys((0, *powers)))

    @property
    def names(self) -> list[str]:
        """Of each band for people, the least active first."""
        named = [f"{low + 1}" if high == low + 1 else f"{low + 1}–{high}" for low, high in self]
        return ["others", *reversed(named)]

    @property
    def tags(self) -> list[str]:
        """Of each band in a metric, so that sorted they are the most active first."""
        digits = len(str(self.rank))
        named = [
            f"{high:0{digits}}" if high == low + 1 else f"{low + 1:0{digits}}-{high:0{digits}}"
            for low, high in self
        ]
        return ["others", *reversed(named)]

    def shares(self, along: Values, total: float) -> Values:
        """Shares of energy in each band, the least active first; zeros of none.

        Args:
            along: (rank,): energy along each direction.
            total: energy in all.
        """
        held = [float(along[low:high].sum()) for low, high in self]
        shares = np.array([max(total - sum(held), 0.0), *reversed(held)])
        return shares / total if total > 0 else shares

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return pairwise(self.edges)


def said_of_energy(
    what: str,
    directions: int,
    before: float,
    by_chance: float,
    after: float | None,
    strength: float,
) -> str:
    """What is said of one step.

    Args:
        what: "gradient" or "update".
        directions: of each layer.
        before, after: shares of its energy along them; None: nothing is filtered.
        by_chance: the share of a signal without direction.
        strength: of the filter.
    """
    one = directions == 1
    which = "direction" if one else f"{directions} directions"
    filtered = ""
    if after is not None:
        full = "" if strength == 1 else f" at strength {strength:.3g}"
        filtered = f"; {percent(after)} after the filter{full}"
    return (
        f"{percent(before)} of the {what} goes along the {which} that the inputs of each layer "
        f"use most (by chance {percent(by_chance)}){filtered}"
    )


def percent(share: float) -> str:
    """A share for people; small ones with two digits."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.2g} %"
