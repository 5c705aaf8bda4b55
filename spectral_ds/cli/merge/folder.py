"""Folders of Hugging Face models: their tensors one by one, and their small files.

Tensors are read lazily: a folder of any size takes the memory of the tensor that is asked for.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from spectral_ds.cli.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Of what a folder holds besides weights; what a training leaves there is not the model's.
SMALL = frozenset((".json", ".jinja", ".md", ".model", ".py", ".tiktoken", ".txt"))
OF_TRAINING = frozenset(("trainer_state.json", "all_results.json", "train_results.json"))
OF_OTHER_WEIGHTS = ("adapter_", "spectral_ds_merge")
# What a fingerprint reads of a file: its beginning, which names and places tensors, and samples.
BEGINNING, SAMPLE, SAMPLES = 2**20, 2**12, 64


@dataclass(frozen=True)
class Stored:
    """A tensor as it is stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Tensors(Protocol):
    """A model as its tensors.

    Attributes:
        given: as the user named it.
        stored: by name, all tensors.
        config: of transformers.
    """

    given: str
    stored: Mapping[str, Stored]
    config: Any

    def read(self, name: str) -> torch.Tensor:
        """A tensor, on the CPU, in its own dtype; not to be written to."""

    def fingerprint(self) -> str:
        """Changes if what is stored changes."""

    def small_files(self) -> dict[str, Path | str]:
        """What a folder of the model holds besides its weights: a file, or its content, by name."""

    def tokenizer_folder(self) -> Path | None:
        """Where its tokenizer lies; None if it has none of its own."""


class Folder:
    """A folder with `model.safetensors`, or with shards and their index.

    Raises:
        UserError: there is none, it holds no such weights, or they are quantized.
    """

    def __init__(self, given: str) -> None:
        self.given, self.path = given, Path(given)
        if not self.path.is_dir():
            raise UserError(f"{given}: no such folder (models of the hub: hf download first)")
        files = _weights_of(self.path, given)
        self.config = config_of(self.path, given)
        if getattr(self.config, "quantization_config", None) is not None:
            raise UserError(f"{given}: is quantized; merge takes weights as they were trained")
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        stored = {}
        for file in files:
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118
                part = handle.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise UserError(f"{given}: {name} is stored as {part.get_dtype()}")
                self._files[name] = file
                stored[name] = Stored(tuple(part.get_shape()), dtype)
        self.stored: Mapping[str, Stored] = stored

    def _handle(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._open:
            try:
                self._open[file] = safe_open(file, "pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file}: cannot be read: {error}") from error
        return self._open[file]

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._handle(self._files[name]).get_tensor(name)
        return tensor

    def fingerprint(self) -> str:
        return fingerprint_of([*sorted(set(self._files.values())), self.path / "config.json"])

    def small_files(self) -> dict[str, Path | str]:
        found: dict[str, Path | str] = {}
        modules = self._modules()
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path)
            # Sentence-transformers and chat templates have folders; trainings have checkpoints.
            outer = name.parts[0] if len(name.parts) > 1 else ""
            is_checkpoint = outer.startswith((".", "checkpoint", "global_step", "runs"))
            is_wanted = _is_small(path) or not modules.isdisjoint(name.parents)
            if path.is_file() and not is_checkpoint and is_wanted:
                found[name.as_posix()] = path
        return found

    def _modules(self) -> set[Path]:
        """Folders of what sentence-transformers has behind the model, with weights of their own."""
        file = self.path / "modules.json"
        if not file.exists():
            return set()
        modules = _read_json(file)
        try:
            paths = {Path(each.get("path", "")) for each in modules}
        except (AttributeError, TypeError) as error:
            raise UserError(f"{file}: must be a list of modules, each with its path") from error
        return {path for path in paths if path.parts}

    def tokenizer_folder(self) -> Path | None:
        return self.path if (self.path / "tokenizer_config.json").exists() else None


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def dtype_of(stored: Mapping[str, Stored]) -> torch.dtype:
    """Of a model: of its first floating-point tensor; masks and counters come as others."""
    return next(each.dtype for each in stored.values() if each.dtype.is_floating_point)


def _is_small(path: Path) -> bool:
    name = path.name
    return (
        path.suffix in SMALL
        and not name.endswith(".index.json")
        and name not in OF_TRAINING
        and not name.startswith(OF_OTHER_WEIGHTS)
    )


def _weights_of(path: Path, given: str) -> list[Path]:
    """The safetensors files of a model."""
    if (path / SINGLE).exists():
        return [path / SINGLE]
    if not (path / INDEX).exists():
        others = sorted(each.name for each in path.glob("*.bin"))
        if others:
            raise UserError(
                f"{given}: holds {others[0]} and no safetensors; load it with transformers and "
                "save it again: from_pretrained(OLD).save_pretrained(NEW)"
            )
        raise UserError(f"{given}: holds neither {SINGLE} nor {INDEX}")
    index = _read_json(path / INDEX)
    try:
        files = [path / name for name in sorted(set(index["weight_map"].values()))]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path / INDEX}: must hold weight_map, files by tensor") from error
    for file in files:
        if not file.exists():
            raise UserError(f"{file}: no such file, and {INDEX} names it")
    return files


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error


def config_of(path: Path, given: str) -> Any:
    """The configuration of a model.

    Raises:
        UserError: transformers cannot read it.
    """
    from spectral_ds.cli.models import Source

    return Source(given, str(path), {}).configuration()


def fingerprint_of(files: Iterable[Path]) -> str:
    """Of the content of files: their sizes, their beginnings and samples all over them."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(BEGINNING))
            for sample in range(SAMPLES):
                file.seek(sample * max(size - SAMPLE, 0) // SAMPLES)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()
