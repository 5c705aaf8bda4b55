"""PluginState: everything the plugin carries from step to step, as this rank holds it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from spectral_ds.graph import Edges
from spectral_ds.sharding import Fragment


@dataclass
class Pieces:
    """Runs of flattened tensors, one for each of some fragments; None: there is none.

    Attributes:
        fragments: parameter, start and length of each.
        values: flat, float32.
        may_lack: whether a reader may go on without.
    """

    fragments: Sequence[Fragment]
    values: list[torch.Tensor | None]
    may_lack: bool = False


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
PieceReader = Callable[[str, Sequence[Fragment], bool], list[torch.Tensor | None]]


def assemble(
    kind: str,
    wanted: Sequence[Fragment],
    may_lack: bool,
    available: dict[str, list[tuple[int, int, Callable[[int, int], torch.Tensor]]]],
    fail: Callable[[str], Exception],
) -> list[torch.Tensor | None]:
    """Put wanted runs together from saved ones, however they were cut.

    Args:
        kind: for the error.
        wanted: runs to put together.
        may_lack: whether a parameter may have none.
        available: by parameter: (start, length, read), where read(first, last) gives that part of
            the saved run.
        fail: makes the error.
    """
    found: list[torch.Tensor | None] = []
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
        if position == fragment.end:
            found.append(values)
        elif may_lack and position == fragment.start:
            found.append(None)
        else:
            raise fail(
                f"{kind} of parameter {fragment.parameter!r} lacks elements [{position}, "
                f"{fragment.end})"
            )
    return found
