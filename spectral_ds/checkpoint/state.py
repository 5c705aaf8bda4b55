"""What the plugin carries from step to step: the parts that own it, and all of it together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from spectral_ds.graph import Edges
from spectral_ds.sharding import Fragment, Signal


class CheckpointError(RuntimeError):
    """The plugin's part of a checkpoint cannot be used; says which file or parameter."""


@dataclass
class Pieces:
    """Runs of flattened tensors, one for each of some fragments; None: there is none.

    Attributes:
        fragments: parameter, start and length of each.
        values: flat, float32.
    """

    fragments: Sequence[Fragment]
    values: list[torch.Tensor | None]

    @classmethod
    def of(cls, fragments: Sequence[Fragment | None], values: Signal) -> "Pieces":
        """The values of the fragments that are not None."""
        pairs = [(f, v) for f, v in zip(fragments, values, strict=True) if f is not None]
        return cls([fragment for fragment, _ in pairs], [value for _, value in pairs])

    def fill(self, values: Sequence[torch.Tensor]) -> None:
        """Copy values into those that there are, in place."""
        for target, value in zip(self.values, values, strict=True):
            if target is not None:
                target.copy_(value)


@dataclass
class PartState:
    """The state of one part, by names that no other part has.

    Attributes:
        numbers: small tensors, equal on all ranks.
        pieces: sharded tensors.
        edges: of a graph, those from the nodes that this rank answers for; None: it is no graph.
    """

    numbers: dict[str, torch.Tensor] = field(default_factory=dict)
    pieces: dict[str, Pieces] = field(default_factory=dict)
    edges: Edges | None = None

    def __or__(self, other: "PartState") -> "PartState":
        edges = other.edges if self.edges is None else self.edges
        return PartState(self.numbers | other.numbers, self.pieces | other.pieces, edges)


@dataclass
class PluginState:
    """The state at the end of a step, as this rank holds it.

    Attributes:
        model: shape of every parameter by name: who reads must have the same.
        graphs: digest of the configuration of each stacked graph.
        numbers: small tensors, equal on all ranks: step, running statistics.
        edges: of each stacked graph, those from the nodes that this rank answers for; nodes are
            numbered parameter after parameter, in model order.
        pieces: by kind: reference weights, temporal means, sketches.
    """

    model: dict[str, tuple[int, ...]]
    graphs: list[str]
    numbers: dict[str, torch.Tensor] = field(default_factory=dict)
    edges: list[Edges] = field(default_factory=list)
    pieces: dict[str, Pieces] = field(default_factory=dict)

    def add(self, part: PartState) -> None:
        """Take in the state of a part; graphs come in their order."""
        self.numbers |= part.numbers
        self.pieces |= part.pieces
        if part.edges is not None:
            self.edges.append(part.edges)


# Gives the values of wanted fragments of one kind.
PieceReader = Callable[[str, Sequence[Fragment]], list[torch.Tensor]]


class SavedState(NamedTuple):
    """A state that has been read and checked, of this model.

    Attributes:
        where: it is, for people.
        graphs: as in `PluginState`; perhaps others than the running plugin's.
        numbers: as saved.
        edges: of each graph, all edges.
        pieces: gives parts of the pieces; raises CheckpointError where elements are missing.
        untrained: names of the parameters that it is of and that the model does not train yet.
    """

    where: str
    graphs: Sequence[str]
    numbers: Mapping[str, torch.Tensor]
    edges: Sequence[Edges]
    pieces: PieceReader
    untrained: Sequence[str] = ()

    def tensor(self, name: str) -> torch.Tensor:
        """A small tensor of the state.

        Raises:
            CheckpointError: it has none.
        """
        if name not in self.numbers:
            raise CheckpointError(f"{self.where} lacks {name!r}")
        return self.numbers[name]

    def number(self, name: str) -> float:
        """A number of the state.

        Raises:
            CheckpointError: it has none.
        """
        return float(self.tensor(name).item())


# Puts in place what has been read of a state (collective).
Restoration = Callable[[], None]


class Part(Protocol):
    """Owns a part of the state."""

    def state(self) -> PartState:
        """What it carries, as this rank holds it (collective)."""

    def restore(self, saved: SavedState) -> Restoration:
        """Read what it needs of a state; no communication, and nothing is changed yet.

        Raises:
            CheckpointError: the state lacks something that it needs.
        """


class GraphPart(Part, Protocol):
    """A graph and what is measured on it.

    Attributes:
        digest: of its configuration.
    """

    @property
    def digest(self) -> str: ...

    def changed_inputs(self, saved: SavedState) -> str:
        """Which files that it is made of say something else than those of a state; "": none."""

    def most_edges(self) -> int:
        """The most directed edges that it can have."""

    def whole_pieces(self) -> dict[str, dict[str, int]]:
        """The pieces that a distributed checkpoint keeps whole: elements by name and parameter."""


class StatefulStack(Protocol):
    """All parts of a plugin, and how it begins without a state."""

    @property
    def graphs(self) -> Sequence[GraphPart]: ...

    @property
    def memories(self) -> Sequence[Part]:
        """The parts that depend on no graph."""

    def rebuild(self) -> None:
        """Make graphs of what the model is now (collective)."""

    def begin_anew(self) -> None:
        """Make graphs of the present weights, which are the reference from now on (collective)."""


def numbers_below(prefix: str, numbers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The numbers whose names begin with a prefix and a dot, by the rest of their names."""
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in numbers.items() if n.startswith(start)}


def difference_of_graphs(saved: Sequence[str], expected: Sequence[str]) -> str:
    """How the digests of two states' graphs differ; empty if they do not."""
    if len(saved) != len(expected):
        return f"{len(saved)} graphs there and {len(expected)} here"
    pairs = enumerate(zip(saved, expected, strict=True))
    numbers = [str(index) for index, (there, here) in pairs if there != here]
    if not numbers:
        return ""
    return f"graph {', '.join(numbers)} of {len(expected)} differs, counted from 0"


def assemble(
    kind: str,
    wanted: Sequence[Fragment],
    available: dict[str, list[tuple[int, int, Callable[[int, int], torch.Tensor]]]],
) -> list[torch.Tensor]:
    """Put wanted runs together from saved ones, however they were cut.

    Args:
        kind: for the error.
        wanted: runs to put together.
        available: by parameter: (start, length, read), where read(first, last) gives that part of
            the saved run.

    Raises:
        CheckpointError: elements of a parameter are missing.
    """
    found: list[torch.Tensor] = []
    for fragment in wanted:
        runs = available.get(fragment.parameter, [])
        values = torch.empty(fragment.length, dtype=torch.float32, device="cpu")
        position = fragment.start
        for start, length, read in sorted(runs, key=lambda run: run[0]):
            if start <= position < min(start + length, fragment.end):
                last = min(start + length, fragment.end)
                offset = position - fragment.start
                values[offset : offset + last - position] = read(position - start, last - start)
                position = last
        if position != fragment.end:
            raise CheckpointError(
                f"{kind} of parameter {fragment.parameter!r} lacks elements [{position}, "
                f"{fragment.end})"
            )
        found.append(values)
    return found
