"""Plugin state in a folder: one safetensors file a rank, and a manifest that makes them valid.

The manifest is replaced in one operation after all files are complete, so that a crash at any
moment leaves the state of before or that of after. Files are read at any world size.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spectral_ds.checkpoint.state import (
    CheckpointError,
    PieceReader,
    PluginState,
    assemble,
    check_graphs,
)
from spectral_ds.graph import Edges
from spectral_ds.sharding import Communicator, Fragment

MANIFEST = "manifest.json"
VERSION = 2
SEPARATOR = "|"


def write_state(folder: Path, state: PluginState, shard: int, everyone: Communicator) -> None:
    """Write the state of all ranks (collective).

    Args:
        folder: on a file system that all ranks see; made if missing.
        state: of this rank.
        shard: which shard this rank holds; of replicas, which hold the same, one writes it.
        everyone: all ranks.

    Raises:
        OSError: a rank could not write; on all ranks. What was there before is still valid.
    """
    token = everyone.gather_objects(secrets.token_hex(8))[0]
    is_replica = everyone.gather_objects(shard).index(shard) < everyone.rank
    name = f"rank-{everyone.rank:05d}-{token}.safetensors"
    entry: dict[str, Any] | None = None
    with everyone.all_or_none():
        folder.mkdir(parents=True, exist_ok=True)
        if not is_replica:
            save_file(_tensors(state, everyone.rank), folder / name)
            _synchronize(folder / name)
            entry = {"name": name, "bytes": (folder / name).stat().st_size} | {
                "sha256": _digest(folder / name)
            }
    files = [each for each in everyone.gather_objects(entry) if each is not None]
    with everyone.all_or_none():
        if everyone.rank == 0:
            manifest = {
                "version": VERSION,
                "model": state.model,
                "graphs": state.graphs,
                "files": files,
            }
            _replace(folder / MANIFEST, json.dumps(manifest, indent=1))
            for old in folder.glob("rank-*.safetensors"):
                if token not in old.name:
                    old.unlink()


def _tensors(state: PluginState, rank: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    if rank == 0:
        found |= {f"number{SEPARATOR}{n}": t.cpu().reshape(-1) for n, t in state.numbers.items()}
    for index, edges in enumerate(state.edges):
        for part in ("source", "target", "weight"):
            values = np.ascontiguousarray(getattr(edges, part))
            found[f"edges{SEPARATOR}{index}{SEPARATOR}{part}"] = torch.from_numpy(values)
    for kind, pieces in state.pieces.items():
        for fragment, value in zip(pieces.fragments, pieces.values, strict=True):
            if value is not None:
                key = SEPARATOR.join((kind, fragment.parameter, str(fragment.start)))
                found[key] = value.detach().cpu().contiguous()
    return found


def _synchronize(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, "utf-8")
    _synchronize(temporary)
    os.replace(temporary, path)
    with suppress(OSError):  # not every file system lets a folder be synchronized
        descriptor = os.open(path.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


class StateReader:
    """A state on disk. All ranks raise if one cannot read it.

    Args:
        folder: that `write_state` wrote.
        expected: the running plugin's state, to compare the model and the graphs with.
        everyone: all ranks; each checks a part of the files.

    Raises:
        CheckpointError: a file is missing, unreadable, cut or altered, or is of another model or
            graph.

    Attributes:
        numbers: as saved.
        edges: of each graph, all edges.
    """

    def __init__(self, folder: Path, expected: PluginState, everyone: Communicator) -> None:
        with everyone.all_or_none():
            manifest = _manifest(folder)
            _check_same(manifest, expected, folder / MANIFEST)
            for index, entry in enumerate(manifest["files"]):
                _check_file(folder / entry["name"], entry, index, everyone)
        self._files = [folder / entry["name"] for entry in manifest["files"]]
        self._runs: dict[str, dict[str, list[Any]]] = {}
        self.numbers: dict[str, torch.Tensor] = {}
        with everyone.all_or_none():
            parts: list[dict[str, list[torch.Tensor]]] = [{} for _ in manifest["graphs"]]
            for path in self._files:
                self._read_header(path, parts)
            if not all(parts):
                raise CheckpointError(f"{folder} lacks the edges of a graph")
            self.edges = [
                Edges(*(torch.cat(part[name]).numpy() for name in ("source", "target", "weight")))
                for part in parts
            ]

    def _read_header(self, path: Path, edges: list[dict[str, list[torch.Tensor]]]) -> None:
        with _reading(path), safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                kind, rest = key.split(SEPARATOR, 1)
                if kind == "number":
                    self.numbers[rest] = file.get_tensor(key)
                elif kind == "edges":
                    index, part = rest.split(SEPARATOR)
                    edges[int(index)].setdefault(part, []).append(file.get_tensor(key))
                else:
                    parameter, start = rest.rsplit(SEPARATOR, 1)  # a name may hold separators
                    (length,) = file.get_slice(key).get_shape()
                    runs = self._runs.setdefault(kind, {}).setdefault(parameter, [])
                    runs.append((int(start), length, partial(_read_run, path, key)))

    def pieces(self, kind: str, wanted: Sequence[Fragment]) -> list[torch.Tensor]:
        """Values of wanted fragments, however they were cut when saved; no communication.

        Raises:
            CheckpointError: elements of a parameter are missing, or a file cannot be read.
        """
        return assemble(kind, wanted, self._runs.get(kind, {}))


def read_state(
    folder: Path, expected: PluginState, everyone: Communicator
) -> tuple[dict[str, torch.Tensor], list[Edges], PieceReader]:
    """Numbers, edges and a reader of pieces; see `StateReader` (collective)."""
    reader = StateReader(folder, expected, everyone)
    return reader.numbers, reader.edges, reader.pieces


def _read_run(path: Path, key: str, first: int, last: int) -> torch.Tensor:
    with _reading(path), safe_open(path, "pt") as file:
        values: torch.Tensor = file.get_slice(key)[first:last]
        return values


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What cannot be read is a CheckpointError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    with _reading(path):
        manifest = json.loads(path.read_text("utf-8"))
        keys = {"version", "model", "graphs", "files"}
        if not isinstance(manifest, dict) or not keys <= manifest.keys():
            raise ValueError(f"it must have the keys {sorted(keys)}")
        if not isinstance(manifest["model"], dict) or not isinstance(manifest["files"], list):
            raise ValueError("model must be an object, and files a list")
        for entry in manifest["files"]:
            if not isinstance(entry, dict) or not {"name", "bytes", "sha256"} <= entry.keys():
                raise ValueError(f"each file must have name, bytes and sha256, unlike {entry}")
    if manifest["version"] != VERSION:
        raise CheckpointError(
            f"{path} is of version {manifest['version']}; this version reads {VERSION}"
        )
    return manifest


def _check_same(manifest: dict[str, Any], expected: PluginState, path: Path) -> None:
    saved = {name: tuple(shape) for name, shape in manifest["model"].items()}
    for name in (*saved, *expected.model):
        if saved.get(name) != expected.model.get(name):
            raise CheckpointError(
                f"{path} is of another model: parameter {name!r} has shape {saved.get(name)} there "
                f"and {expected.model.get(name)} here"
            )
    if list(saved) != list(expected.model):
        raise CheckpointError(f"{path} is of another model: parameters are in another order")
    check_graphs(manifest["graphs"], expected.graphs, str(path))


def _check_file(path: Path, entry: dict[str, Any], index: int, everyone: Communicator) -> None:
    with _reading(path):
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path} has {size} bytes, not {entry['bytes']}")
        if index % everyone.world_size == everyone.rank and _digest(path) != entry["sha256"]:
            raise CheckpointError(f"{path} is altered: its SHA-256 is not that of the manifest")
        with safe_open(path, "pt"):
            pass
