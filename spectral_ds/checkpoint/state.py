"""PluginState: everything the plugin carries from step to step, as this rank holds it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from spectral_ds.graph import Edges
from spectral_ds.sharding import Fragment


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


@dataclass
class PluginState:
    """The state at the end of a step.

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


# Gives the values of wanted fragments of one kind.
PieceReader = Callable[[str, Sequence[Fragment]], list[torch.Tensor]]


def check_graphs(saved: Sequence[str], expected: Sequence[str], where: str) -> None:
    """Compare the digests of two states' graphs.

    Args:
        where: the saved state, for the error.

    Raises:
        CheckpointError: they differ; says in which graph.
    """
    if len(saved) != len(expected):
        difference = f"{len(saved)} graphs there and {len(expected)} here"
    else:
        pairs = enumerate(zip(saved, expected, strict=True))
        numbers = [str(index) for index, (there, here) in pairs if there != here]
        if not numbers:
            return
        difference = f"graph {', '.join(numbers)} of {len(expected)} differs, counted from 0"
    raise CheckpointError(
        f"{where} is of another graph configuration (spectral_ds.graph, graphs or seed): "
        f"{difference}; restore it, or set spectral_ds.checkpoint.strict to false to start with a "
        "new graph"
    )


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
        values = torch.empty(fragment.length)
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
