"""The configuration: what loads, presets, sources, digest."""

import dataclasses
import json
import operator
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from spectral_ds import config as config_module
from spectral_ds.config import (
    PRESETS,
    RESPONSES,
    EdgeConfig,
    FilterConfig,
    GraphConfig,
    SpectralConfig,
    SpectralConfigError,
    TemporalConfig,
    load_config,
    loading,
)

# The whole section with its defaults, as the documentation prints it.
FULL_DEFAULT_SECTION = """
spectral_ds:
  enabled: true
  preset: paper
  graph:
    node: row
    include: ["*"]
    exclude: ["*embed*", "*lm_head*", "*classifier*", "*pooler*"]
    edges: [{family: similarity, features: weights, neighbours: 8, scope: parameter, \
sketch_width: 64, head_width: 0, rank: 64, keep: random, learn: none, samples: 256, length: 64, \
tokenizer: "", weight: 1.0}]
    laplacian: normalized
    refresh_interval: 0
  graphs: []
  filter: {response: heat, tau: 1.0, alpha: 0.4, coefficients: [], cutoff: 0.25, low: 0.0, \
high: 0.5, gains: [], bands: 8, power: 0.5, order: best, tolerance: 1.0e-3, strength: 0.5, \
rescale: none, apply_to: gradient, rest: 1.0, warmup_steps: 0, decay_steps: 0, interval: 1, \
temporal: null}
  statistics: {interval: 10, decay: 0.99}
  regularizer: {strength: 0.0, response: laplacian, ridge: 0.0, coupling: joint, \
reference: pretrained, reference_device: same}
  monitor: {enabled: true, interval: 10, bands: 8, figures_interval: 100, folder: ""}
  operator: {kernel: best, exchange: best}
  checkpoint: {enabled: true, strict: true}
  seed: 0
"""


def section_with(key: str, value: object) -> dict[str, Any]:
    """The section that holds one key; ``graph.edges[0].x`` makes an edge."""
    for part in reversed(key.split(".")):
        value = {"edges": [value]} if part == "edges[0]" else {part: value}
    assert isinstance(value, dict)
    return value


def message_of(section: object) -> str:
    with pytest.raises(SpectralConfigError) as caught:
        load_config(section)  # type: ignore[arg-type]
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# What loads


def test_empty_section_is_the_paper_preset() -> None:
    config = load_config({})
    assert config == load_config({"preset": "paper"}) == SpectralConfig()
    assert config.graph.edges == (EdgeConfig("similarity", "weights", 8),)
    assert config.graph.laplacian == "normalized"
    assert (config.filter.response, config.filter.tau, config.filter.strength) == ("heat", 1.0, 0.5)


def test_full_default_section_equals_the_empty_one() -> None:
    assert load_config(yaml.safe_load(FULL_DEFAULT_SECTION)) == load_config({})


def test_full_default_section_is_full() -> None:
    section = yaml.safe_load(FULL_DEFAULT_SECTION)["spectral_ds"]
    assert section == dataclasses.asdict(SpectralConfig(), dict_factory=with_lists)


def with_lists(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}


@pytest.mark.parametrize(
    "filter_keys",
    [
        {"response": "identity"},
        {"response": "window", "alpha": 1},
        {"response": "tikhonov", "tau": 0},
        {"response": "polynomial", "coefficients": [1, -0.5]},
        {"response": "lowpass", "cutoff": 0},
        {"response": "highpass", "cutoff": 1},
        {"response": "bandpass", "low": 0.2, "high": 0.4},
        {"response": "bands", "gains": [1, 0, -1]},
        {"response": "wiener", "bands": 4},
        {"response": "whiten", "power": 0},
    ],
)
def test_full_default_section_loads_with_any_response(filter_keys: dict[str, Any]) -> None:
    section = yaml.safe_load(FULL_DEFAULT_SECTION)["spectral_ds"]
    section["filter"].update(filter_keys)
    assert load_config(section) == load_config({"filter": filter_keys})


def test_default_similarity_keys_load_with_depth() -> None:
    section = yaml.safe_load(FULL_DEFAULT_SECTION)["spectral_ds"]
    section["graph"]["edges"][0]["family"] = "depth"
    assert load_config(section).graph.edges == (EdgeConfig("depth"),)


@pytest.mark.parametrize(
    "edge",
    [
        {"rank": 1, "samples": 1, "length": 1},
        {"keep": "generated", "learn": "training"},
        {"keep": "given", "learn": "texts.jsonl"},
        {"keep": "folder/stats.safetensors", "learn": "none", "tokenizer": "folder"},
        {"weight": 1.0},
    ],
)
@pytest.mark.parametrize("response", ["tikhonov", "heat", "identity"])
def test_a_graph_of_activations_loads(edge: dict[str, Any], response: str) -> None:
    graph = {"node": "column", "edges": [{"family": "activations", **edge}]}
    filter_keys = {"response": response, "apply_to": "update", "rest": 0.6}
    config = load_config({"graph": graph, "filter": filter_keys})
    assert config.graph.edges == (EdgeConfig("activations", **edge),)
    assert config.filter.rest == 0.6
    assert config.has_activations
    graphs = [{"edges": [{"family": "depth"}]}, graph]
    assert load_config({"graphs": graphs, "filter": filter_keys}).has_activations


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("graph.edges[0].neighbours", 1),
        ("graph.edges[0].sketch_width", 0),
        ("graph.edges[0].scope", "role"),
        ("graph.exclude", []),
        ("graph.node", "column"),
        ("graph.laplacian", "combinatorial"),
        ("graph.refresh_interval", 100),
        ("graphs", []),
        ("filter.tau", 0),
        ("filter.order", 1),
        ("filter.order", 512),
        ("filter.order", "best"),
        ("filter.strength", 0),
        ("filter.strength", 1),
        ("filter.warmup_steps", 100),
        ("filter.decay_steps", 100),
        ("filter.interval", 2),
        ("filter.rescale", "norm"),
        ("filter.apply_to", "update"),
        ("filter.temporal", {"decay": 0}),
        ("statistics.interval", 1),
        ("regularizer.strength", 0),
        ("regularizer.ridge", 0),
        ("regularizer.response", "tikhonov"),
        ("regularizer.reference", "zero"),
        ("regularizer.reference_device", "cpu"),
        ("monitor.interval", 1),
        ("monitor.bands", 2),
        ("monitor.bands", 64),
        ("operator.kernel", "torch_csr"),
        ("operator.exchange", "boundary"),
        ("operator.exchange", "transpose"),
        ("enabled", False),
        ("seed", 2**63 - 1),
    ],
)
def test_values_at_the_ends_of_their_range_load(key: str, value: object) -> None:
    assert load_config(section_with(key, value)) is not None


def test_integer_is_fine_for_a_number_and_becomes_one() -> None:
    tau = load_config({"filter": {"tau": 1}}).filter.tau
    assert isinstance(tau, float)
    assert load_config({"filter": {"tau": 1}}).digest() == load_config({}).digest()


def test_keys_left_out_of_an_edge_take_their_defaults() -> None:
    edges = [{"family": "depth", "weight": 2}, {"family": "similarity", "neighbours": 3}]
    assert load_config({"graph": {"edges": edges}}).graph.edges == (
        EdgeConfig("depth", weight=2.0),
        EdgeConfig("similarity", neighbours=3),
    )


def test_graphs_stand_in_place_of_the_graph() -> None:
    assert load_config({}).stack == (GraphConfig(),)
    graphs = [{"node": "column", "edges": [{"family": "ring"}]}, {}]
    config = load_config({"graphs": graphs})
    assert config.stack == config.graphs
    assert config.graphs == (GraphConfig("column", edges=(EdgeConfig("ring"),)), GraphConfig())


def test_schema_is_an_omegaconf_structured_config() -> None:
    assert OmegaConf.structured(SpectralConfig) == OmegaConf.structured(load_config({}))


def test_configuration_is_read_only() -> None:
    config = load_config({"graph": {"edges": [{"family": "depth"}]}})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.filter.tau = 2.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.graph.edges[0].weight = 2.0  # type: ignore[misc]
    assert isinstance(config.graph.edges, tuple)
    assert isinstance(config.graph.include, tuple)


def test_source_is_left_as_it_was() -> None:
    source = {"spectral_ds": {"filter": {"tau": 1}, "graph": {"edges": [{"family": "depth"}]}}}
    before = json.dumps(source)
    load_config(source)
    assert json.dumps(source) == before


# Presets


@pytest.mark.parametrize(
    ("preset", "families", "keys"),
    [
        ("paper", "similarity by weights", {"filter.response": "heat", "filter.strength": 0.5}),
        (
            "retain",
            "activations by weights",
            {"graph.node": "column", "monitor.interval": 20,
             "filter.response": "tikhonov", "filter.tau": 1.0, "filter.strength": 1.0,
             "filter.apply_to": "update", "filter.rest": 1.0},
        ),
        (
            "denoise",
            "similarity by gradient",
            {"graph.node": "column", "graph.refresh_interval": 50, "filter.response": "wiener",
             "statistics.interval": 1, "statistics.decay": 0.98},
        ),
        (
            "gradient_smoothing",
            "depth by weights",
            {"graph.laplacian": "combinatorial", "filter.response": "window",
             "filter.alpha": 0.4, "filter.strength": 1.0, "filter.apply_to": "update"},
        ),
        (
            "laplacian_smoothing",
            "ring by weights",
            {"graph.node": "element", "graph.exclude": (), "graph.laplacian": "combinatorial",
             "filter.response": "tikhonov", "filter.tau": 1.0, "filter.strength": 1.0},
        ),
        (
            "grokfast",
            "depth by weights",
            {"graph.exclude": (), "filter.response": "identity",
             "filter.temporal": TemporalConfig(0.98, 2.0)},
        ),
        (
            "whiten",
            "similarity by gradient",
            {"graph.node": "row", "graph.refresh_interval": 50, "filter.response": "whiten",
             "filter.power": 0.5},
        ),
        ("observe", "similarity by weights", {"filter.response": "identity"}),
    ],
)  # fmt: skip
def test_preset_sets_its_keys(preset: str, families: str, keys: dict[str, object]) -> None:
    config = load_config({"preset": preset})
    assert config.preset == preset
    assert [f"{e.family} by {e.features}" for e in config.graph.edges] == [families]
    assert {key: operator.attrgetter(key)(config) for key in keys} == keys


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_itself_a_valid_section(preset: str) -> None:
    path = Path(config_module.__file__).parent / "presets" / f"{preset}.yaml"
    keys = yaml.safe_load(path.read_text())
    assert load_config({**keys, "preset": preset}) == load_config({"preset": preset})


def test_every_preset_has_a_file_and_every_file_is_a_preset() -> None:
    folder = Path(config_module.__file__).parent / "presets"
    assert {path.stem for path in folder.iterdir()} == set(PRESETS)


def test_key_the_user_wrote_wins_over_the_preset() -> None:
    config = load_config({"preset": "observe", "filter": {"response": "heat", "tau": 3.0}})
    assert (config.preset, config.filter.response, config.filter.tau) == ("observe", "heat", 3.0)


def test_edges_the_user_wrote_replace_the_list_of_the_preset() -> None:
    config = load_config({"graph": {"edges": [{"family": "depth"}]}})
    assert config.graph.edges == (EdgeConfig("depth"),)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("response", ["identity", "heat", "lowpass", "tikhonov"])
def test_every_preset_takes_another_response(preset: str, response: str) -> None:
    assert load_config({"preset": preset, "filter": {"response": response}}).filter.response == (
        response
    )


def test_parameters_of_the_preset_response_are_dropped_with_the_response(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preset = {"filter": {"response": "heat", "tau": 5.0, "strength": 0.9}}
    monkeypatch.setattr(
        loading, "_read_preset", lambda name: OmegaConf.to_container(OmegaConf.create(preset))
    )
    assert load_config({"filter": {"response": "heat"}}).filter.tau == 5.0
    window = load_config({"filter": {"response": "window"}}).filter
    assert (window.tau, window.strength) == (FilterConfig.tau, 0.9)


# Sources


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


# Digest


def leaves(section: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every value of a configuration that is no dataclass itself."""
    found = []
    for each in dataclasses.fields(section):
        value = getattr(section, each.name)
        here = (*path, each.name)
        found += leaves(value, here) if dataclasses.is_dataclass(value) else [here]
    return found


def with_value_changed(section: Any, path: tuple[str, ...]) -> Any:
    name, *rest = path
    value = getattr(section, name)
    changed: object
    if rest:
        changed = with_value_changed(value, tuple(rest))
    elif isinstance(value, bool):
        changed = not value
    elif isinstance(value, int | float):
        changed = value + 1
    elif isinstance(value, str):
        changed = f"{value}x"
    elif name == "edges":
        changed = (dataclasses.replace(value[0], neighbours=9),)
    else:
        changed = {"graphs": (GraphConfig(),), "temporal": TemporalConfig()}.get(name, ("0.5",))
    return dataclasses.replace(section, **{name: changed})


@pytest.mark.parametrize("path", leaves(SpectralConfig()), ids=".".join)
def test_digest_changes_with_any_value(path: tuple[str, ...]) -> None:
    assert with_value_changed(SpectralConfig(), path).digest() != SpectralConfig().digest()


def test_digest_does_not_depend_on_key_order() -> None:
    section = yaml.safe_load(FULL_DEFAULT_SECTION)["spectral_ds"]
    shuffled = list(section.items())
    random.Random(0).shuffle(shuffled)
    shuffled = [
        (key, dict(reversed(value.items())) if isinstance(value, dict) else value)
        for key, value in shuffled
    ]
    assert list(dict(shuffled)) != list(section)
    assert load_config(dict(shuffled)).digest() == load_config(section).digest()


def test_digest_is_a_sha256() -> None:
    digest = load_config({}).digest()
    assert len(digest) == 64
    assert int(digest, 16) > 0


def keys_of(config: object, above: str = "") -> set[str]:
    """Every key of a section, as the configuration's README writes it."""
    found = set()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("graphs", "temporal"):
            found.add(above + field.name)
        elif dataclasses.is_dataclass(value):
            found |= keys_of(value, f"{above}{field.name}.")
        elif field.name == "edges":
            found |= keys_of(value[0], f"{above}edges[].") | {above + "edges"}
        else:
            found.add(above + field.name)
    return found


def test_the_readme_of_the_configurations_has_every_key_response_and_preset() -> None:
    text = (Path(__file__).parent.parent / "configs" / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])}
    missing = (keys_of(load_config({})) | {*PRESETS, *RESPONSES}) - named
    assert not missing
