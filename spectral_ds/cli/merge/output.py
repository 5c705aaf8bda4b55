"""The folder that is written: weights shard by shard, the rest copied, and how far it has come.

A shard is complete when it has its name; what a process that was stopped has left under another
name is written again.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spectral_ds.cli.errors import UserError
from spectral_ds.cli.merge.folder import INDEX, SINGLE, Stored, Tensors
from spectral_ds.files import write_whole

STATE = "spectral_ds_merge.json"
STATISTICS = "statistics"
FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """A file of the result."""

    file: str
    names: tuple[str, ...]


def plan(stored: Mapping[str, Stored], largest: float) -> list[Shard]:
    """Tensors in order of their names, in files of at most `largest` bytes (or of one tensor)."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(stored):
        more = stored[name].bytes
        if groups[-1] and size + more > largest:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += more
    if len(groups) == 1:
        return [Shard(SINGLE, tuple(groups[0]))]
    count = len(groups)
    return [
        Shard(f"model-{number:05d}-of-{count:05d}.safetensors", tuple(names))
        for number, names in enumerate(groups, start=1)
    ]


class Output:
    """A folder with its state.

    Args:
        folder: new, empty, or with the state of the same merge.
        arguments: what makes the result, as the user gave it.
        inputs: fingerprints of all that is read, by what it is.

    Attributes:
        done: what is known of each file that is written, by its name.

    Raises:
        UserError: the folder holds something else.
    """

    def __init__(self, folder: Path, arguments: Mapping[str, Any], inputs: Mapping[str, str]):
        self.folder = folder
        self._own: dict[str, Any] = {
            "format": FORMAT,
            "arguments": dict(arguments),
            "inputs": dict(inputs),
        }
        self.done: dict[str, Any] = {}
        self.report: dict[str, Any] = {}
        path = folder / STATE
        self._made = [each for each in (path, folder / STATISTICS, folder) if not each.exists()]
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder}: is not a folder")
        if path.exists():
            try:
                state = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{path}: is not JSON ({error})") from error
            self._require_same(state)
            self.done, self.report = state["done"], state["report"]
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(f"--out {folder}: is not empty, and holds no merge to go on with")
        try:
            (folder / STATISTICS).mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            raise UserError(f"--out {folder}: {error.strerror or error}") from error

    def _require_same(self, state: Mapping[str, Any]) -> None:
        for part in ("arguments", "inputs"):
            before, now = state.get(part, {}), self._own[part]
            for key in {**before, **now}:
                was, given = before.get(key), now.get(key)
                if was != given:
                    how = f"with {key} = {was}, not {given}"
                    if part == "inputs":
                        how = f"of another content of {key}"
                    raise UserError(
                        f"--out {self.folder}: holds a merge {how}; name another folder, or "
                        "delete this one"
                    )

    def _write(self) -> None:
        state = {"format": FORMAT, **self._own, "done": self.done, "report": self.report}
        write_whole(
            self.folder / STATE,
            lambda path: path.write_text(
                json.dumps(state, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            ),
        )

    def leave_if_empty(self) -> None:
        """Remove what the constructor has made, if nothing else is there."""
        if {each.name for each in self.folder.rglob("*")} == {STATE, STATISTICS}:
            for path in self._made:
                if path.is_dir():
                    path.rmdir()
                else:
                    path.unlink()

    def statistics(self, what: str) -> Path:
        """Where statistics lie."""
        return self.folder / STATISTICS / f"{what}.safetensors"

    def is_done(self, shard: Shard) -> bool:
        return shard.file in self.done and (self.folder / shard.file).exists()

    def write_shard(self, shard: Shard, tensors: dict[str, torch.Tensor], found: Any) -> None:
        """Write a shard, and remember what is to be told of it."""
        from safetensors.torch import save_file

        write_whole(
            self.folder / shard.file,
            lambda path: save_file(tensors, path, metadata={"format": "pt"}),
        )
        self.done[shard.file] = found
        self._write()

    def finish(self, shards: Sequence[Shard], model: Tensors, report: Mapping[str, Any]) -> None:
        """Write the index and all that is no weight, and the report."""
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(each.bytes for each in model.stored.values())},
                "weight_map": {name: shard.file for shard in shards for name in shard.names},
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self.folder / INDEX).write_text(text, encoding="utf-8")
        for name, content in model.small_files().items():
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                target.write_text(content, encoding="utf-8")
            else:
                shutil.copyfile(content, target)
        self.report = dict(report)
        self._write()
