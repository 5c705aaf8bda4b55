"""Plugin state as tensors of fixed shapes, for `torch.distributed.checkpoint`.

DCP loads into tensors that exist: edges are padded to the most that a graph can have, and the rest
is whole on every rank or a DTensor laid out like its parameter.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from spectral_ds.checkpoint.folder import CheckpointError
from spectral_ds.checkpoint.state import PieceReader, PluginState, assemble
from spectral_ds.graph import Edges
from spectral_ds.sharding import Communicator, Fragment

# Makes a tensor that DCP saves sharded, of a fragment's values; None where it cannot.
Wrapper = Callable[[Fragment, torch.Tensor], Any]


def to_tensors(
    state: PluginState,
    capacity: Sequence[int],
    whole: dict[str, dict[str, int]],
    wrap: Wrapper,
    communicator: Communicator,
) -> dict[str, Any]:
    """The state as a flat dictionary of tensors (collective).

    Args:
        capacity: the most directed edges that each graph can have.
        whole: by kind, the pieces that are to be whole on every rank: elements by parameter.
        wrap: for the other kinds.
        communicator: the ranks that share the parameters.
    """
    found: dict[str, Any] = {f"numbers.{name}": t.clone() for name, t in state.numbers.items()}
    for index, own in enumerate(state.edges):
        edges = Edges.concatenate(communicator.gather_objects(own))
        count, room = len(edges), capacity[index]
        assert count <= room, "a graph has no more edges than its families can make"
        ends = np.stack((edges.source, edges.target), axis=1)
        found[f"edges.{index}.ends"] = torch.from_numpy(np.pad(ends, ((0, room - count), (0, 0))))
        found[f"edges.{index}.weight"] = torch.from_numpy(np.pad(edges.weight, (0, room - count)))
    for kind, pieces in state.pieces.items():
        if kind in whole:
            for name, numel in whole[kind].items():
                total = torch.zeros(numel, device=communicator.device)
                for fragment, value in zip(pieces.fragments, pieces.values, strict=True):
                    if fragment.parameter == name and value is not None:
                        total[fragment.start : fragment.end] = value
                found[f"{kind}.{name}"] = communicator.sum_(total)
        else:
            for fragment, value in zip(pieces.fragments, pieces.values, strict=True):
                if value is not None:
                    found[f"{kind}.{fragment.parameter}"] = wrap(fragment, value)
    return found


def from_tensors(
    tensors: dict[str, Any], unwrap: Callable[[Any], torch.Tensor], state: PluginState
) -> tuple[dict[str, torch.Tensor], list[Edges], PieceReader]:
    """Numbers, edges and a reader of pieces, as `read_state` gives them.

    Args:
        tensors: what `to_tensors` gave, loaded.
        unwrap: gives this rank's flat part of what `Wrapper` made.
        state: the running plugin's: its fragments say which part each tensor holds.

    Raises:
        CheckpointError: a tensor is missing.
    """

    def get(key: str) -> Any:
        if key not in tensors:
            raise CheckpointError(f"the plugin's state lacks {key!r}")
        return tensors[key]

    numbers = {name: get(f"numbers.{name}") for name in state.numbers}
    edges = []
    for index in range(len(state.edges)):
        weight = get(f"edges.{index}.weight").cpu().numpy()
        ends = get(f"edges.{index}.ends").cpu().numpy()[weight > 0]
        edges.append(Edges(ends[:, 0], ends[:, 1], weight[weight > 0]))

    def pieces(kind: str, wanted: Sequence[Fragment], may_lack: bool) -> list[torch.Tensor | None]:
        here = {f.parameter: f for f in state.pieces[kind].fragments if f.length > 0}
        available: dict[str, list[Any]] = {}
        for fragment in wanted:
            key = f"{kind}.{fragment.parameter}"
            if key in tensors:
                values = unwrap(tensors[key])
                own = here.get(fragment.parameter)
                start = 0 if own is None or values.numel() != own.length else own.start
                read = lambda first, last, values=values: values[first:last]  # noqa: E731
                available[fragment.parameter] = [(start, values.numel(), read)]
        return assemble(kind, wanted, may_lack, available, CheckpointError)

    return numbers, edges, pieces
