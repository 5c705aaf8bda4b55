"""Plugin state in a folder: one safetensors file a rank, and a manifest that makes them valid.

The manifest is replaced in one operation after all files are complete, so that a crash at any
moment leaves the state of before or that of after. Files are read at any world size.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
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
    PluginState,
    SavedState,
    assemble,
)
from spectral_ds.graph import Edges
from spectral_ds.sharding import Communicator, Fragment

MANIFEST = "manifest.json"
VERSION = 3
SEPARATOR = "|"


def write_state(folder: Path, state: PluginState, shard: int, everyone: Communicator) -> None:
    """Write the state of all ranks (collective).

    Args:
        folder: on a file system that all ranks see; made if missing.
        state: of this rank.
        shard: which shard this rank holds; of replicas, which hold the same, one writes it.
        everyone: all ranks.

    Raises:
        OSError: a rank could not write, or rank 0 does not see what it wrote; on all ranks. What
            was there before is still valid.
    """
    token = everyone.gather_objects(secrets.token_hex(8))[0]
    is_replica = everyone.gather_objects(shard).index(shard) < everyone.rank
    name = f"rank-{everyone.rank:05d}-{token}.safetensors"
    entry: dict[str, Any] | None = None
    with everyone.all_or_none():
        folder.mkdir(parents=True, exist_ok=True)
        if not is_replica:
            try:
                save_file(_tensors(state, everyone.rank), folder / name)
            except SafetensorError as error:  # also of a full disk
                raise OSError(f"{folder / name} cannot be written: {error}") from error
            _synchronize(folder / name)
            entry = {"name": name, "bytes": (folder / name).stat().st_size} | {
                "sha256": _digest(folder / name)
            }
    files = [each for each in everyone.gather_objects(entry) if each is not None]
    with everyone.all_or_none():
        if everyone.rank == 0:
            _require_visible(folder, files)
            manifest = {
                "version": VERSION,
                "model": state.model,
                "graphs": state.graphs,
                "files": files,
            }
            manifest["sha256"] = manifest_digest(manifest)
            _replace(folder / MANIFEST, json.dumps(manifest, indent=1))
            for old in folder.glob("rank-*.safetensors"):
                if token not in old.name:
                    with suppress(OSError):  # the state is saved; what is left does no harm
                        old.unlink()


def _require_visible(folder: Path, files: Sequence[dict[str, Any]]) -> None:
    """Raise OSError unless the files of all ranks lie in the folder that this rank sees."""
    for entry in files:
        path = folder / entry["name"]
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise OSError(
                f"{path} was written by another rank, but rank 0 does not see it: the folder must "
                "be on a file system that all nodes share; with spectral_ds.checkpoint.enabled: "
                "false nothing is written, and a resumed run makes a new graph and reference"
            )


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all of a manifest but its own digest."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


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


class _Files:
    """The files of a checked manifest.

    Attributes:
        numbers: as saved.
        edges: of each graph, all edges.
    """

    def __init__(self, paths: Sequence[Path], graphs: int) -> None:
        # By kind and parameter: (start, length, reader) of each run.
        self._runs: dict[str, dict[str, list[Any]]] = {}
        self.numbers: dict[str, torch.Tensor] = {}
        parts: list[dict[str, list[torch.Tensor]]] = [{} for _ in range(graphs)]
        for path in paths:
            self._read_header(path, parts)
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
        """Values of wanted fragments, however they were cut when saved; no communication."""
        return assemble(kind, wanted, self._runs.get(kind, {}))


def read_state(
    folder: Path,
    expected: PluginState,
    everyone: Communicator,
    untrained: Collection[str] = (),
) -> SavedState:
    """Read what `write_state` wrote, at any world size (collective).

    Args:
        folder: on a file system that all ranks see.
        expected: the running plugin's state, to compare the model with.
        everyone: all ranks; each checks a part of the files.
        untrained: names of parameters that the state may be of besides.

    Raises:
        CheckpointError: a file is missing, unreadable, cut or altered, or is of another model; on
            all ranks.
    """
    with everyone.all_or_none():
        manifest = _manifest(folder / MANIFEST)
        awaited = _check_model(manifest, expected, untrained, folder / MANIFEST)
        for index, entry in enumerate(manifest["files"]):
            is_mine = index % everyone.world_size == everyone.rank
            _check_file(folder / entry["name"], entry, is_mine)
    with everyone.all_or_none():
        paths = [folder / entry["name"] for entry in manifest["files"]]
        files = _Files(paths, len(manifest["graphs"]))
    where = str(folder / MANIFEST)
    return SavedState(where, manifest["graphs"], files.numbers, files.edges, files.pieces, awaited)


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


def _manifest(path: Path) -> dict[str, Any]:
    with _reading(path):
        manifest = json.loads(path.read_text("utf-8"))
        if not isinstance(manifest, dict) or not manifest.keys() >= {"version", "sha256"}:
            raise ValueError("it must be an object with a version and a checksum")
    if manifest["version"] != VERSION:
        raise CheckpointError(
            f"{path} is of version {manifest['version']}; this version reads {VERSION}"
        )
    if manifest["sha256"] != manifest_digest(manifest):
        raise CheckpointError(f"{path} is altered: its SHA-256 is not that of its content")
    return manifest


def _check_model(
    manifest: Mapping[str, Any], expected: PluginState, untrained: Collection[str], path: Path
) -> list[str]:
    """Refuse the state of another model; those of the untrained parameters that it is of."""
    whole = {name: tuple(shape) for name, shape in manifest["model"].items()}
    saved = {name: shape for name, shape in whole.items() if name not in untrained}
    for name in (*saved, *expected.model):
        if saved.get(name) != expected.model.get(name):
            there, here = (m.get(name, "not trained") for m in (saved, expected.model))
            raise CheckpointError(
                f"{path} is of another model: parameter {name!r} has shape {there} there and "
                f"{here} here"
            )
    if list(saved) != list(expected.model):
        raise CheckpointError(f"{path} is of another model: parameters are in another order")
    return [name for name in whole if name in untrained]


def _check_file(path: Path, entry: Mapping[str, Any], is_mine: bool) -> None:
    with _reading(path):
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path} has {size} bytes, not {entry['bytes']}")
        if is_mine and _digest(path) != entry["sha256"]:
            raise CheckpointError(f"{path} is altered: its SHA-256 is not that of the manifest")
        with safe_open(path, "pt"):
            pass
