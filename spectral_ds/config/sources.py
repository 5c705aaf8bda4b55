"""Where a configuration comes from: a dict, a DeepSpeed JSON or a YAML file.

In: what `load_config` was given. Out: the section, as it was written.
"""

import difflib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import hjson  # type: ignore[import-untyped]
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

SECTION = "spectral_ds"

# Keys by which a whole DeepSpeed config is known when it has no section.
DEEPSPEED_KEYS = {"train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization"}


class SpectralConfigError(ValueError):
    """The configuration cannot be used. One line a problem: key, value, what is allowed."""


def read_section(source: Mapping[str, Any] | str | os.PathLike[str], keys: Collection[str]) -> Any:
    """The section of a dict or a file, as it was written.

    Args:
        keys: of the section: beside it in a YAML file, they would be lost without a word.
    """
    is_yaml = False
    if isinstance(source, Mapping):
        content, name, section_may_be_bare = plain(source), "the config", True
    elif isinstance(source, str | os.PathLike):
        is_yaml = Path(source).suffix.lower() in (".yaml", ".yml")
        content = _read_yaml(Path(source)) if is_yaml else read_json(source)
        name, section_may_be_bare = str(source), is_yaml
    else:
        raise SpectralConfigError(f"config = {source!r}: must be a mapping or a path")
    if not isinstance(content, Mapping):
        raise SpectralConfigError(f"{name}: must hold a mapping, holds {show(content)}")
    if SECTION in content:
        if is_yaml:
            _refuse_beside_section(name, content, keys)
        return plain(content[SECTION])
    misspelt = difflib.get_close_matches(SECTION, map(str, content), n=1, cutoff=0.8)
    if misspelt or not section_may_be_bare or DEEPSPEED_KEYS & content.keys():
        hint = f"; nearest key there: {misspelt[0]}" if misspelt else ""
        raise SpectralConfigError(f'{name}: the section "{SECTION}" is missing{hint}')
    return content


def _refuse_beside_section(name: str, content: Mapping[str, Any], keys: Collection[str]) -> None:
    """Refuse what was meant to stand in the section; numbers and words may be for `${...}`."""
    for key, value in content.items():
        if key in keys and isinstance(value, Mapping | list):
            raise SpectralConfigError(
                f'{name}: {key} = {show(value)}: must stand in the section "{SECTION}", not beside'
            )


def read_json(path: str | os.PathLike[str]) -> Any:
    """A DeepSpeed JSON, read as DeepSpeed reads it: comments allowed, no key twice.

    Raises:
        SpectralConfigError: the file cannot be read.
    """
    try:
        return hjson.loads(Path(path).read_text("utf-8"), object_pairs_hook=_no_duplicates)
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        raise SpectralConfigError(f"{path}: cannot be read as JSON: {error}") from error


def _read_yaml(path: Path) -> Any:
    try:
        return plain(OmegaConf.load(path))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise SpectralConfigError(f"{path}: cannot be read as YAML: {error}") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'the key "{name}" is written twice')
    return dict(pairs)


def plain(value: Any) -> Any:
    """An OmegaConf container as dicts and lists, interpolations resolved; else unchanged."""
    if OmegaConf.is_config(value):
        try:
            return OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            key = error.full_key or SECTION
            raise SpectralConfigError(f"{key}: {str(error).splitlines()[0]}") from error
    return value


def show(value: Any) -> str:
    """A value as the user wrote it, in JSON on one line."""
    try:
        text = json.dumps(value, default=repr, ensure_ascii=False)
    except (TypeError, ValueError):  # keys that JSON does not have
        text = repr(value)
    text = printable(text)
    return text if len(text) <= 100 else f"{text[:97]}..."


def printable(text: str) -> str:
    """The same on one line: what has no shape is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
