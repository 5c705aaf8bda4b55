"""Fragments: contiguous runs of flattened parameters, and the layout of all of them.

In: the fragments of this rank, as its engine reports them. Out: a `ShardLayout` that is the same
on every rank and says for each element of each parameter which rank owns it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch

from spectral_ds.sharding.collectives import Communicator

# A value for each of this rank's fragments, flat, any floating dtype; None where there is none.
Signal: TypeAlias = Sequence[torch.Tensor | None]


class ShardLayoutError(RuntimeError):
    """The ranks' fragments do not own every element of every parameter exactly once."""


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + length) of one parameter, flattened in row-major order."""

    parameter: str
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


# By parameter, a rank's fragments with their numbers in order.
FragmentsByParameter = Mapping[str, Sequence[tuple[int, Fragment]]]


def by_parameter(fragments: Sequence[Fragment]) -> FragmentsByParameter:
    """The fragments of one rank, to be found by parameter."""
    found: dict[str, list[tuple[int, Fragment]]] = defaultdict(list)
    for index, fragment in enumerate(fragments):
        found[fragment.parameter].append((index, fragment))
    return dict(found)


@dataclass(frozen=True)
class ShardLayout:
    """The fragments of all ranks.

    Attributes:
        fragments: one tuple of fragments a rank, in the order in which that rank's engine
            yields its tensors.
        rank: this rank.
    """

    fragments: tuple[tuple[Fragment, ...], ...]
    rank: int

    @classmethod
    def gather(cls, fragments: Sequence[Fragment], communicator: Communicator) -> "ShardLayout":
        """Collect every rank's fragments (one collective on the communicator's group)."""
        gathered = communicator.gather_objects(tuple(fragments))
        return cls(tuple(gathered), communicator.rank)

    @property
    def world_size(self) -> int:
        return len(self.fragments)

    @property
    def own(self) -> tuple[Fragment, ...]:
        return self.fragments[self.rank]

    @cached_property
    def held(self) -> "FragmentsByParameter":
        """This rank's fragments by parameter."""
        return by_parameter(self.own)

    @cached_property
    def holdings(self) -> Mapping[str, Sequence[tuple[int, int, Fragment]]]:
        """By parameter: (rank, number among that rank's fragments, fragment), rank by rank."""
        found: dict[str, list[tuple[int, int, Fragment]]] = defaultdict(list)
        for rank, fragments in enumerate(self.fragments):
            for index, fragment in enumerate(fragments):
                found[fragment.parameter].append((rank, index, fragment))
        return dict(found)

    def check(self, sizes: Mapping[str, int]) -> None:
        """Raise ShardLayoutError unless each element of each parameter has exactly one owner.

        Args:
            sizes: number of elements by parameter name.
        """
        for name in sizes:
            owned = self.holdings.get(name, ())
            position = 0
            for start, end, rank in sorted((part.start, part.end, rank) for rank, _, part in owned):
                if start != position:
                    kind = "twice" if start < position else "by no rank"
                    raise ShardLayoutError(
                        f"element {min(start, position)} of parameter {name!r} is owned {kind} "
                        f"(next fragment: rank {rank}, [{start}, {end}))"
                    )
                position = end
            if position != sizes[name]:
                raise ShardLayoutError(
                    f"fragments of parameter {name!r} end at element {position}, "
                    f"but it has {sizes[name]}"
                )
