"""The configuration: what loads, its digest, and its documentation."""

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from spectral_ds.config import (
    PRESETS,
    RESPONSES,
    EdgeConfig,
    GraphConfig,
    SpectralConfig,
    TemporalConfig,
    load_config,
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
  statistics: {interval: 20, decay: 0.99}
  regularizer: {strength: 0.0, response: laplacian, ridge: 0.0, coupling: joint, \
reference: pretrained, reference_device: same}
  monitor: {enabled: true, interval: 20, bands: 8, figures_interval: 100, folder: ""}
  operator: {kernel: best, exchange: best, exchange_dtype: float32}
  checkpoint: {enabled: true, strict: true}
  seed: 0
"""


def section_with(key: str, value: object) -> dict[str, Any]:
    """The section that holds one key; ``graph.edges[0].x`` makes an edge."""
    for part in reversed(key.split(".")):
        value = {"edges": [value]} if part == "edges[0]" else {part: value}
    assert isinstance(value, dict)
    return value


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
        ("filter.temporal.decay", 0),
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
        ("operator.exchange_dtype", "bfloat16"),
        ("enabled", False),
        ("seed", 2**63 - 1),
    ],
)
def test_values_at_the_ends_of_their_range_load(key: str, value: object) -> None:
    found: Any = dataclasses.asdict(load_config(section_with(key, value)), dict_factory=with_lists)
    for part in key.replace("[0]", ".0").split("."):
        found = found[int(part) if part.isdecimal() else part]
    assert found == value


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
