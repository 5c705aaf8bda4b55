"""Statistics of activations as one small safetensors file: one calibration serves many runs.

By the parameter whose input it is: `NAME/values` (matrices, k), float64; `NAME/vectors` (matrices,
inputs, k), float32; `NAME/known` (matrices,), how many of them there are. The metadata say which
parameters share a graph, how many directions of each there are at most, and the SHA-256 of all.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from spectral_ds.coactivation.graph import Coactivation, Spectra
from spectral_ds.coactivation.inputs import InputsError
from spectral_ds.coactivation.spectrum import Values, spectrum_of
from spectral_ds.files import write_whole

Array: TypeAlias = npt.NDArray[Any]

SUFFIX = ".safetensors"
FORMAT = "spectral_ds.coactivation.2"


def save(path: Path, graphs: Coactivation, of: str, rank: int) -> None:
    """Write the graphs into a file.

    Args:
        rank: the most directions of a graph; where fewer are known, there are no others.
        of: what inputs they are of, for people.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors.numpy import save_file

    arrays: dict[str, Array] = {}
    for name, spectra in graphs.spectra.items():
        values, vectors, known = as_arrays(spectra)
        arrays |= {f"{name}/values": values, f"{name}/vectors": vectors, f"{name}/known": known}
    metadata = {"format": FORMAT, "leaders": json.dumps(dict(graphs.leaders)), "of": of}
    metadata["rank"] = str(rank)
    metadata["sha256"] = _digest(arrays, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda unfinished: save_file(arrays, unfinished, metadata))


def load(path: Path, rank: int) -> Coactivation:
    """Read what `save` wrote, so many directions of each graph.

    Raises:
        InputsError: there is no such file, it is none of these, it is damaged, or it has fewer.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputsError("it holds no statistics of activations")
            keys = file.keys()
            arrays: dict[str, Array] = {key: file.get_tensor(key) for key in keys}
    except (OSError, SafetensorError) as error:
        raise InputsError(f"it cannot be read: {error}") from error
    if metadata.pop("sha256", None) != _digest(arrays, metadata):
        raise InputsError("it is damaged: its content is not of its SHA-256")
    if int(metadata["rank"]) < rank:
        raise InputsError(f"its statistics are of rank {metadata['rank']}, below {rank}")
    leaders: dict[str, str] = json.loads(metadata["leaders"])
    spectra = {
        name: from_arrays(*(arrays[f"{name}/{part}"] for part in PARTS))
        for name in dict.fromkeys(leaders.values())
    }
    return Coactivation(leaders, spectra).of_rank(rank)


def _digest(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
    """SHA-256 of all that a file says."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


PARTS = ("values", "vectors", "known")


class Arrays(NamedTuple):
    """The spectra of a site's matrices, with zeros where fewer directions are known.

    Attributes:
        values: (matrices, k), float64.
        vectors: (matrices, inputs, k), float32.
        known: (matrices,), int64: how many directions are.
    """

    values: Values
    vectors: npt.NDArray[np.float32]
    known: npt.NDArray[np.int64]


def as_arrays(spectra: Spectra) -> Arrays:
    """The spectra of a site as arrays."""
    present = [each for each in spectra if each is not None]
    most = max((len(each.values) for each in present), default=1)
    inputs = present[0].inputs if present else 1
    values = np.zeros((len(spectra), most))
    vectors = np.zeros((len(spectra), inputs, most), np.float32)
    known = np.zeros(len(spectra), np.int64)
    for matrix, each in enumerate(spectra):
        if each is not None:
            known[matrix] = k = len(each.values)
            values[matrix, :k], vectors[matrix, :, :k] = each.values, each.vectors
    return Arrays(values, vectors, known)


def from_arrays(
    values: Values, vectors: npt.NDArray[np.float32], known: npt.NDArray[np.int64]
) -> Spectra:
    """Undoes `as_arrays`."""
    return [
        spectrum_of(values[matrix, :k].copy(), vectors[matrix, :, :k].copy()) if k else None
        for matrix, k in enumerate(known.tolist())
    ]
