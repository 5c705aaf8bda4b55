"""Where a configuration is read from: dicts, DeepSpeed's JSON, YAML."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from spectral_ds.config import SpectralConfigError, load_config


def message_of(section: object) -> str:
    with pytest.raises(SpectralConfigError) as caught:
        load_config(section)  # type: ignore[arg-type]
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


SECTION_OF_ALL_SOURCES = {"filter": {"response": "tikhonov", "tau": 2.0, "tolerance": 1e-4}}


def test_section_is_found_in_a_whole_deepspeed_dict() -> None:
    whole = {"train_batch_size": 8, "spectral_ds": SECTION_OF_ALL_SOURCES}
    assert load_config(whole) == load_config(SECTION_OF_ALL_SOURCES)


def test_dict_may_hold_omegaconf_sections() -> None:
    section = OmegaConf.create(SECTION_OF_ALL_SOURCES)
    assert load_config(section) == load_config(SECTION_OF_ALL_SOURCES)
    assert load_config({"spectral_ds": section}) == load_config(SECTION_OF_ALL_SOURCES)


@pytest.mark.parametrize("as_path", [str, Path])
def test_section_is_found_in_a_deepspeed_json(tmp_path: Path, as_path: Any) -> None:
    whole = {"zero_optimization": {"stage": 2}, "spectral_ds": SECTION_OF_ALL_SOURCES}
    path = write(tmp_path / "ds.json", json.dumps(whole))
    assert load_config(as_path(path)) == load_config(SECTION_OF_ALL_SOURCES)


def test_deepspeed_json_may_hold_comments_as_deepspeed_allows(tmp_path: Path) -> None:
    text = '{\n  // why\n  "train_batch_size": 8,\n  # and\n  "spectral_ds": {"seed": 3},\n}'
    assert load_config(write(tmp_path / "ds.json", text)).seed == 3


def test_yaml_may_hold_variables_beside_the_section_but_none_of_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "section.yaml"
    write(path, "seed: 3\nspectral_ds:\n  seed: ${seed}\n")
    assert load_config(path).seed == 3
    write(path, "spectral_ds:\n  seed: 3\nfilter: {tau: 3.0}\n")
    assert message_of(path) == (
        f'{path}: filter = {{"tau": 3.0}}: must stand in the section "spectral_ds", not beside'
    )


@pytest.mark.parametrize("text", ['{"spectral_ds": {"seed": 1e999}}', "[" * 3000])
def test_json_of_no_number_or_end_is_an_error_of_the_file(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "ds.json", text)
    assert message_of(path).startswith(f"{path}: cannot be read as JSON: ")


@pytest.mark.parametrize("under_key", [True, False])
@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_yaml_holds_the_section_bare_or_under_its_key(
    tmp_path: Path, suffix: str, under_key: bool
) -> None:
    content: Any = {"spectral_ds": SECTION_OF_ALL_SOURCES} if under_key else SECTION_OF_ALL_SOURCES
    path = write(tmp_path / f"section{suffix}", yaml.safe_dump(content))
    assert load_config(path) == load_config(SECTION_OF_ALL_SOURCES)


def test_yaml_number_without_a_point_is_a_number(tmp_path: Path) -> None:
    path = write(tmp_path / "section.yaml", "filter: {tolerance: 1e-2}")
    assert load_config(path).filter.tolerance == 0.01


def test_yaml_interpolation_is_resolved(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "t: 3.0\nspectral_ds: {filter: {tau: '${t}'}}")
    assert load_config(path).filter.tau == 3.0


@pytest.mark.parametrize("name", ["missing.json", "missing.yaml"])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    assert str(tmp_path / name) in message_of(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("broken.json", '{"spectral_ds": {'),
        ("broken.yaml", "spectral_ds: {filter: [}"),
        ("list.json", "[1, 2]"),
        ("list.yaml", "[1, 2]"),
        ("number.yaml", "3"),
        ("unresolved.yaml", "seed: ${nothing}"),
        ("twice.json", '{"spectral_ds": {"seed": 1, "seed": 2}}'),
        ("twice.yaml", "seed: 1\nseed: 2"),
    ],
)
def test_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, text: str) -> None:
    path = write(tmp_path / name, text)
    assert str(path) in message_of(path)


@pytest.mark.parametrize(
    "key", ["train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization"]
)
def test_deepspeed_dict_without_the_section_says_so(key: str) -> None:
    assert 'the section "spectral_ds" is missing' in message_of({key: 1})


def test_json_without_the_section_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "ds.json", '{"seed": 1}')
    message = message_of(path)
    assert str(path) in message
    assert 'the section "spectral_ds" is missing' in message


def test_misspelt_section_is_recognized() -> None:
    message = message_of({"spectral-ds": {}, "train_batch_size": 8})
    assert 'the section "spectral_ds" is missing; nearest key there: spectral-ds' in message


@pytest.mark.parametrize("source", [None, 3, ["a"]])
def test_source_of_another_type_is_refused(source: object) -> None:
    assert "must be a mapping or a path" in message_of(source)
