"""Plugin state as tensors of fixed shapes, for `torch.distributed.checkpoint`.

DCP loads into tensors that exist: edges are padded to the most that a graph can have, and the rest
is whole on every rank or a DTensor laid out like its parameter. Digests tell another model or graph
whose tensors have the same shapes; DCP itself refuses other shapes, and names the tensor.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from spectral_ds.checkpoint.state import (
    CheckpointError,
    PieceReader,
    PluginState,
    assemble,
    check_graphs,
)
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

    They are copies: DCP loads into them before anyone can check what it brings.

    Args:
        capacity: the most directed edges that each graph can have.
        whole: by kind, the pieces that are to be whole on every rank: elements by parameter.
        wrap: for the other kinds.
        communicator: the ranks that share the parameters.
    """
    found: dict[str, Any] = _digests(state)
    found |= {f"numbers.{name}": t.clone() for name, t in state.numbers.items()}
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
                    found[f"{kind}.{fragment.parameter}"] = wrap(fragment, value.clone())
    return found


def from_tensors(
    tensors: dict[str, Any],
    unwrap: Callable[[Any], torch.Tensor],
    state: PluginState,
    everyone: Communicator,
) -> tuple[dict[str, torch.Tensor], list[Edges], PieceReader]:
    """Numbers, edges and a reader of pieces, as `read_state` gives them (collective).

    Args:
        tensors: what `to_tensors` gave, loaded.
        unwrap: gives this rank's flat part of what `Wrapper` made.
        state: the running plugin's, to compare the model and the graphs with; its fragments say
            which part each tensor holds.
        everyone: all ranks.

    Raises:
        CheckpointError: a tensor is missing, or the model or a graph is another; on all ranks.
    """
    edges = []
    with everyone.all_or_none():
        _check_same(tensors, state)
        numbers = {name: _get(tensors, f"numbers.{name}") for name in state.numbers}
        for index in range(len(state.edges)):
            weight = _get(tensors, f"edges.{index}.weight").cpu().numpy()
            ends = _get(tensors, f"edges.{index}.ends").cpu().numpy()[weight > 0]
            edges.append(Edges(ends[:, 0], ends[:, 1], weight[weight > 0]))

    def pieces(kind: str, wanted: Sequence[Fragment]) -> list[torch.Tensor]:
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
        return assemble(kind, wanted, available)

    return numbers, edges, pieces


def _get(tensors: dict[str, Any], key: str) -> Any:
    if key not in tensors:
        raise CheckpointError(f"the plugin's state_dict lacks {key!r}")
    return tensors[key]


def _digests(state: PluginState) -> dict[str, Any]:
    """SHA-256 as 32 bytes: of the parameters' names, of their shapes, and of each graph."""
    found: dict[str, Any] = {
        "digest.names": _digest(list(state.model)),
        "digest.shapes": _digest(list(state.model.values())),
        "digest.graphs": torch.tensor([len(state.graphs)]),
    }
    for index, digest in enumerate(state.graphs):
        found[f"digest.graph.{index}"] = torch.tensor(
            list(bytes.fromhex(digest)), dtype=torch.uint8
        )
    return found


def _digest(value: Any) -> torch.Tensor:
    digest = hashlib.sha256(json.dumps(value).encode()).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)


def _check_same(tensors: dict[str, Any], state: PluginState) -> None:
    where, here = "the plugin's state_dict", _digests(state)
    for key, what in (
        ("digest.names", "parameters have other names, or are in another order"),
        ("digest.shapes", "parameters have other shapes"),
    ):
        if not torch.equal(_get(tensors, key).cpu(), here[key]):
            raise CheckpointError(f"{where} is of another model: {what}")
    count = int(_get(tensors, "digest.graphs").item())
    both = range(min(count, len(state.graphs)))
    graphs = [_get(tensors, f"digest.graph.{index}") for index in both]
    saved = [bytes(graph.tolist()).hex() for graph in graphs]
    check_graphs(saved + [""] * (count - len(both)), state.graphs, where)
