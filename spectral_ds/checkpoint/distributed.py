"""Plugin state as tensors of fixed shapes, for `torch.distributed.checkpoint`.

DCP loads into tensors that exist: edges are padded to the most that a graph can have, and the rest
is whole on every rank or a DTensor laid out like its parameter. Digests tell another model or graph
whose tensors have the same shapes, and checksums what was altered; DCP itself refuses other shapes,
and names the tensor.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from spectral_ds.checkpoint.checksums import add, checksum
from spectral_ds.checkpoint.state import CheckpointError, PluginState, SavedState, assemble
from spectral_ds.graph import Edges
from spectral_ds.sharding import Communicator, Fragment

# Makes a tensor that DCP saves sharded, of a fragment's values; None where it cannot.
Wrapper = Callable[[Fragment, torch.Tensor], Any]
# Gives this rank's flat part of what a Wrapper made.
Unwrapper = Callable[[Any], torch.Tensor]

WHERE = "the plugin's state_dict"
CHECKSUM = "checksum."


def to_tensors(
    state: PluginState,
    capacity: Sequence[int],
    whole: dict[str, dict[str, int]],
    wrap: Wrapper,
    unwrap: Unwrapper,
    communicator: Communicator,
) -> dict[str, Any]:
    """The state as a flat dictionary of tensors (collective).

    They are copies: DCP loads into them before anyone can check what it brings.

    Args:
        capacity: the most directed edges that each graph can have.
        whole: by kind, the pieces that are to be whole on every rank: elements by parameter.
        wrap, unwrap: for the other kinds.
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
                total = torch.zeros(numel, dtype=torch.float32, device=communicator.device)
                for fragment, value in zip(pieces.fragments, pieces.values, strict=True):
                    if fragment.parameter == name and value is not None:
                        total[fragment.start : fragment.end] = value
                found[f"{kind}.{name}"] = communicator.sum_(total)
        else:
            for fragment, value in zip(pieces.fragments, pieces.values, strict=True):
                if value is not None:
                    found[f"{kind}.{fragment.parameter}"] = wrap(fragment, value.clone())
    sums = _checksums(found, unwrap, state, communicator)
    return found | {
        f"{CHECKSUM}{key}": torch.tensor([value], device="cpu") for key, value in sums.items()
    }


def from_tensors(
    tensors: dict[str, Any],
    unwrap: Unwrapper,
    state: PluginState,
    everyone: Communicator,
    communicator: Communicator,
) -> SavedState:
    """What `to_tensors` gave, loaded and checked (collective).

    Args:
        tensors: what `to_tensors` gave, loaded.
        unwrap: see `to_tensors`.
        state: the running plugin's, to compare the model with; its fragments say which part each
            tensor holds.
        everyone: all ranks.
        communicator: the ranks that share the parameters.

    Raises:
        CheckpointError: a tensor is missing or altered, or the model is another; on all ranks.
    """
    with everyone.all_or_none():
        graphs = _check_model(tensors, state)
        numbers = {name: _get(tensors, f"numbers.{name}") for name in state.numbers}
        edges = []
        for index in range(min(len(graphs), len(state.edges))):
            weight = _get(tensors, f"edges.{index}.weight").cpu().numpy()
            ends = _get(tensors, f"edges.{index}.ends").cpu().numpy()[weight > 0]
            edges.append(Edges(ends[:, 0], ends[:, 1], weight[weight > 0]))
        checked = {
            key.removeprefix(CHECKSUM): int(value.item())
            for key, value in tensors.items()
            if key.startswith(CHECKSUM)
        }
        held = {key: _get(tensors, key) for key in checked}
    starts = _starts(tensors, state)
    # Of shards that the configuration has no use for, it is not known where they begin.
    held = {key: held[key] for key in held if key in starts or not _is_sharded(held[key])}
    sums = _checksums(held, unwrap, state, communicator)
    with everyone.all_or_none():
        for key in held:
            if sums.get(key) != checked[key]:
                raise CheckpointError(f"{WHERE} is altered: {key!r} has another checksum")

    def pieces(kind: str, wanted: Sequence[Fragment]) -> list[torch.Tensor]:
        available: dict[str, list[Any]] = {}
        for fragment in wanted:
            key = f"{kind}.{fragment.parameter}"
            if key in tensors:
                values, start = unwrap(tensors[key]), starts.get(key, 0)
                read = lambda first, last, values=values: values[first:last]  # noqa: E731
                available[fragment.parameter] = [(start, values.numel(), read)]
        return assemble(kind, wanted, available)

    return SavedState(WHERE, graphs, numbers, edges, pieces)


def _get(tensors: Mapping[str, Any], key: str) -> Any:
    if key not in tensors:
        raise CheckpointError(f"{WHERE} lacks {key!r}")
    return tensors[key]


def _is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "to_local")


def _starts(tensors: Mapping[str, Any], state: PluginState) -> dict[str, int]:
    """Where in its parameter this rank's part of each sharded tensor begins."""
    return {
        f"{kind}.{fragment.parameter}": fragment.start
        for kind, pieces in state.pieces.items()
        for fragment in pieces.fragments
        if _is_sharded(tensors.get(f"{kind}.{fragment.parameter}"))
    }


def _checksums(
    tensors: Mapping[str, Any], unwrap: Unwrapper, state: PluginState, communicator: Communicator
) -> dict[str, int]:
    """A checksum of each whole tensor, as int64, on all ranks (collective)."""
    starts, own = _starts(tensors, state), {}
    for key, tensor in tensors.items():
        if _is_sharded(tensor):
            own[key] = checksum(unwrap(tensor), starts[key])
        elif communicator.rank == 0:
            own[key] = checksum(tensor.reshape(-1), 0)
    total: dict[str, int] = {}
    for sums in communicator.gather_objects(own):
        for key, value in sums.items():
            total[key] = add(total.get(key, 0), value)
    return total


def _digests(state: PluginState) -> dict[str, Any]:
    """SHA-256 as 32 bytes: of the parameters' names, of their shapes, and of each graph."""
    found: dict[str, Any] = {
        "digest.names": _digest(list(state.model)),
        "digest.shapes": _digest(list(state.model.values())),
        "digest.graphs": torch.tensor([len(state.graphs)], device="cpu"),
    }
    for index, digest in enumerate(state.graphs):
        found[f"digest.graph.{index}"] = torch.tensor(
            list(bytes.fromhex(digest)), dtype=torch.uint8, device="cpu"
        )
    return found


def _digest(value: Any) -> torch.Tensor:
    digest = hashlib.sha256(json.dumps(value).encode()).digest()
    return torch.tensor(list(digest), dtype=torch.uint8, device="cpu")


def _check_model(tensors: Mapping[str, Any], state: PluginState) -> list[str]:
    """The digests of the saved graphs, of the same model."""
    here = _digests(state)
    for key, what in (
        (
            "digest.names",
            "parameters have other names, are in another order, or are not trained yet: unfreeze "
            "them before attaching",
        ),
        ("digest.shapes", "parameters have other shapes"),
    ):
        if not torch.equal(_get(tensors, key).cpu(), here[key]):
            raise CheckpointError(f"{WHERE} is of another model: {what}")
    count = int(_get(tensors, "digest.graphs").item())
    # DCP loads into the graphs that are here: of more than these, only their number is known.
    both = range(min(count, len(state.graphs)))
    graphs = [bytes(_get(tensors, f"digest.graph.{index}").tolist()).hex() for index in both]
    return graphs + [""] * (count - len(both))
