"""The configuration: what loads, what is refused, and what the refusal says."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from spectral_ds import config as config_module
from spectral_ds.config import (
    AVAILABLE,
    EdgeConfig,
    FilterConfig,
    GraphConfig,
    SpectralConfig,
    SpectralConfigError,
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
sketch_width: 64, weight: 1.0}]
    laplacian: normalized
    refresh_interval: 0
  filter: {response: heat, tau: 1.0, order: auto, tolerance: 1.0e-3, strength: 0.5, \
rescale: none, apply_to: gradient, warmup_steps: 0, interval: 1, temporal: null}
  regularizer: {strength: 0.0, response: laplacian, ridge: 0.0, coupling: joint, \
reference: pretrained, reference_device: same}
  monitor: {enabled: true, interval: 10, bands: 8, figures_interval: 100}
  operator: {kernel: auto, exchange: auto}
  checkpoint: {enabled: true}
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


@pytest.mark.parametrize(
    "filter_keys",
    [
        {"response": "identity"},
        {"response": "window", "alpha": 1},
        {"response": "tikhonov", "tau": 0},
        {"response": "polynomial", "coefficients": [1, -0.5]},
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
    ("key", "value"),
    [
        ("graph.edges[0].neighbours", 1),
        ("graph.edges[0].sketch_width", 0),
        ("graph.edges[0].scope", "role"),
        ("graph.exclude", []),
        ("graph.laplacian", "combinatorial"),
        ("filter.tau", 0),
        ("filter.order", 1),
        ("filter.order", 512),
        ("filter.order", "auto"),
        ("filter.strength", 0),
        ("filter.strength", 1),
        ("filter.warmup_steps", 100),
        ("filter.interval", 2),
        ("monitor.interval", 1),
        ("monitor.bands", 2),
        ("monitor.bands", 64),
        ("operator.kernel", "torch_csr"),
        ("operator.exchange", "boundary"),
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


def test_observe_uses_the_identity_response() -> None:
    assert load_config({"preset": "observe"}).filter.response == "identity"


@pytest.mark.parametrize("preset", AVAILABLE["preset"])
def test_every_available_preset_is_itself_a_valid_section(preset: str) -> None:
    path = Path(config_module.__file__).parent / "filters" / "presets" / f"{preset}.yaml"
    keys = yaml.safe_load(path.read_text())
    assert load_config({"preset": preset, **keys}) == load_config({"preset": preset})


def test_key_the_user_wrote_wins_over_the_preset() -> None:
    config = load_config({"preset": "observe", "filter": {"response": "heat", "tau": 3.0}})
    assert (config.preset, config.filter.response, config.filter.tau) == ("observe", "heat", 3.0)


def test_edges_the_user_wrote_replace_the_list_of_the_preset() -> None:
    config = load_config({"graph": {"edges": [{"family": "depth"}]}})
    assert config.graph.edges == (EdgeConfig("depth"),)


def test_parameters_of_the_preset_response_are_dropped_with_the_response(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preset = {"filter": {"response": "heat", "tau": 5.0, "strength": 0.9}}
    monkeypatch.setattr(
        config_module, "_read_preset", lambda name: OmegaConf.to_container(OmegaConf.create(preset))
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


# What is refused

FROM_0_TO_1 = "must be a number from 0 to 1"


@pytest.mark.parametrize(
    ("key", "value", "shown", "allowed"),
    [
        # types
        ("enabled", "yes", '"yes"', "must be true or false"),
        ("enabled", 1, "1", "must be true or false"),
        ("enabled", None, "null", "must be true or false"),
        ("seed", True, "true", "must be an integer from 0 to 2^63 - 1"),
        ("seed", "8", '"8"', "must be an integer"),
        ("seed", 8.0, "8.0", "must be an integer"),
        ("seed", None, "null", "must be an integer"),
        ("filter.tau", "1.0", '"1.0"', "must be a finite number >= 0"),
        ("filter.tau", True, "true", "must be a finite number >= 0"),
        ("filter.tau", None, "null", "must be a finite number >= 0"),
        ("filter.response", None, "null", "must be one of identity, heat"),
        ("filter.response", 3, "3", "must be one of identity, heat"),
        ("filter.coefficients", 1.0, "1.0", "must be a list of finite numbers"),
        ("filter.coefficients", [1.0, "2"], '[1.0, "2"]', "must be a list of finite numbers"),
        ("filter.coefficients", [True], "[true]", "must be a list of finite numbers"),
        ("filter", None, "null", "must be a mapping with keys out of response, tau"),
        ("filter", [1], "[1]", "must be a mapping with keys out of response, tau"),
        ("filter.temporal", 1, "1", "must be a mapping with keys out of decay, amplify"),
        ("graph.edges[0]", "depth", '"depth"', "must be a mapping with keys out of family"),
        ("graph.edges", {"family": "depth"}, '{"family": "depth"}', "must be a non-empty list"),
        ("graph.edges", [], "[]", "must be a non-empty list of mappings"),
        ("graph.include", "*", '"*"', "must be a non-empty list of shell patterns"),
        ("graph.include", [], "[]", "must be a non-empty list of shell patterns"),
        ("graph.include", [""], '[""]', "not empty"),
        ("graph.include", ["${x}"], '["${x}"]', "without ${"),
        ("graph.exclude", ["???"], '["???"]', "not ???"),
        ("graph.exclude", ["a", 3], '["a", 3]', "must be a list of shell patterns"),
        # ranges
        ("graph.edges[0].neighbours", 0, "0", "must be an integer >= 1"),
        ("graph.edges[0].neighbours", -8, "-8", "must be an integer >= 1"),
        ("graph.edges[0].sketch_width", -1, "-1", "must be an integer >= 0"),
        ("graph.edges[0].weight", 0.0, "0.0", "must be a finite number > 0"),
        ("graph.edges[0].weight", float("inf"), "Infinity", "must be a finite number > 0"),
        ("graph.refresh_interval", -1, "-1", "must be an integer >= 0"),
        ("filter.tau", -0.1, "-0.1", "must be a finite number >= 0"),
        ("filter.tau", float("nan"), "NaN", "must be a finite number >= 0"),
        ("filter.tau", 10**400, "1000", "must be a finite number >= 0"),
        ("filter.alpha", 1.1, "1.1", FROM_0_TO_1),
        ("filter.alpha", -0.1, "-0.1", FROM_0_TO_1),
        ("filter.coefficients", [float("nan")], "[NaN]", "must be a list of finite numbers"),
        ("filter.order", 0, "0", "must be auto or an integer from 1 to 512"),
        ("filter.order", 513, "513", "must be auto or an integer from 1 to 512"),
        ("filter.order", "8", '"8"', "must be auto or an integer from 1 to 512"),
        ("filter.order", 8.0, "8.0", "must be auto or an integer from 1 to 512"),
        ("filter.order", True, "true", "must be auto or an integer from 1 to 512"),
        ("filter.tolerance", 0.0, "0.0", "must be a number > 0 and < 1"),
        ("filter.tolerance", 1, "1", "must be a number > 0 and < 1"),
        ("filter.strength", -0.5, "-0.5", FROM_0_TO_1),
        ("filter.strength", 1.5, "1.5", FROM_0_TO_1),
        ("filter.warmup_steps", -1, "-1", "must be an integer >= 0"),
        ("filter.interval", 0, "0", "must be an integer >= 1"),
        ("filter.temporal.decay", 1.0, "1.0", "must be a number >= 0 and < 1"),
        ("regularizer.strength", -1.0, "-1.0", "must be a finite number >= 0"),
        ("regularizer.ridge", -1.0, "-1.0", "must be a finite number >= 0"),
        ("monitor.interval", 0, "0", "must be an integer >= 1"),
        ("monitor.bands", 1, "1", "must be an integer from 2 to 64"),
        ("monitor.bands", 65, "65", "must be an integer from 2 to 64"),
        ("monitor.figures_interval", 0, "0", "must be an integer >= 1"),
        ("seed", -1, "-1", "must be an integer from 0 to 2^63 - 1"),
        ("seed", 2**63, str(2**63), "must be an integer from 0 to 2^63 - 1"),
        # enumerations
        ("preset", "papper", '"papper"', "must be one of paper, retain, denoise"),
        ("graph.node", "rows", '"rows"', "must be one of row, column, element"),
        ("graph.laplacian", "norm", '"norm"', "must be one of normalized, combinatorial"),
        ("graph.edges[0].family", "deep", '"deep"', "must be one of depth, similarity, pair, ring"),
        ("graph.edges[0].features", "w", '"w"', "must be one of weights, gradient"),
        ("graph.edges[0].scope", "all", '"all"', "must be one of parameter, role"),
        ("filter.rescale", "l2", '"l2"', "must be one of none, norm"),
        ("filter.apply_to", "loss", '"loss"', "must be one of gradient, update"),
        ("regularizer.response", "L", '"L"', "must be one of laplacian, identity"),
        ("regularizer.coupling", "both", '"both"', "must be one of joint, decoupled"),
        ("regularizer.reference", "one", '"one"', "must be one of pretrained, zero"),
        ("regularizer.reference_device", "tpu", '"tpu"', "must be one of same, cpu"),
        ("operator.kernel", "csr", '"csr"', "must be one of auto, torch_sparse, torch_csr"),
        ("operator.exchange", "ring", '"ring"', "must be one of auto, boundary, transpose"),
    ],
)
def test_impossible_value_names_key_value_and_what_is_allowed(
    key: str, value: object, shown: str, allowed: str
) -> None:
    message = message_of(section_with(key, value))
    first_line = message.splitlines()[0]
    assert first_line.startswith(f"spectral_ds.{key} = {shown}")
    assert allowed in first_line


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("filters", "filter"),
        ("filter.taus", "filter.tau"),
        ("filter.respnose", "filter.response"),
        ("graph.laplacien", "graph.laplacian"),
        ("graph.edges[0].neighbors", "graph.edges[0].neighbours"),
        ("regularizer.strenght", "regularizer.strength"),
        ("monitor.band", "monitor.bands"),
        ("operator.kernal", "operator.kernel"),
        ("checkpoint.enable", "checkpoint.enabled"),
        # right key, wrong place
        ("tau", "filter.tau"),
        ("filter.laplacian", "graph.laplacian"),
        ("graph.neighbours", "graph.edges[0].neighbours"),
    ],
)
def test_unknown_key_is_an_error_that_names_the_nearest(key: str, nearest: str) -> None:
    message = message_of(section_with(key, 1))
    assert message.startswith(f"spectral_ds.{key} = 1: unknown key; ")
    assert f"nearest: spectral_ds.{nearest} (allowed: " in message


def test_unknown_key_that_is_no_string_is_an_error() -> None:
    assert "spectral_ds.filter.3 = 1: unknown key" in message_of({"filter": {3: 1}})


def test_all_problems_are_reported_one_a_line() -> None:
    section = {
        "sead": 1,
        "filter": {"order": 0, "response": "lowpass", "tau": 2.0},
        "graph": {"edges": [{"family": "depth"}, {"neighbours": -1}, {"family": "ring"}]},
        "monitor": {"bands": 1},
    }
    keys = [line.partition(" = ")[0] for line in message_of(section).splitlines()]
    assert keys == [
        "spectral_ds.sead",
        "spectral_ds.filter.order",
        "spectral_ds.filter.response",
        "spectral_ds.graph.edges[1].neighbours",
        "spectral_ds.graph.edges[2].family",
        "spectral_ds.monitor.bands",
    ]


@pytest.mark.parametrize(
    ("filter_keys", "problem"),
    [
        ({"response": "window", "tau": 2.0}, "tau = 2.0: belongs to response heat or tikhonov"),
        ({"response": "identity", "tau": 2.0}, "tau = 2.0: belongs to response heat or tikhonov"),
        ({"alpha": 0.3}, "alpha = 0.3: belongs to response window, not to heat"),
        ({"coefficients": [1]}, "coefficients = [1.0]: belongs to response polynomial"),
    ],
)
def test_filter_key_that_the_response_does_not_use_is_an_error(
    filter_keys: dict[str, Any], problem: str
) -> None:
    assert f"spectral_ds.filter.{problem}" in message_of({"filter": filter_keys})


def test_filter_key_is_judged_by_the_response_of_the_preset() -> None:
    message = message_of({"preset": "observe", "filter": {"tau": 2.0}})
    assert message == (
        "spectral_ds.filter.tau = 2.0: belongs to response heat or tikhonov, not to identity"
    )


@pytest.mark.parametrize(("key", "value"), [("neighbours", 4), ("sketch_width", 0)])
def test_edge_key_that_the_family_does_not_use_is_an_error(key: str, value: int) -> None:
    edges = [{"family": "similarity"}, {"family": "depth", key: value}]
    assert message_of({"graph": {"edges": edges}}) == (
        f"spectral_ds.graph.edges[1].{key} = {value}: belongs to family similarity, not to depth"
    )


@pytest.mark.parametrize("filter_keys", [{}, {"coefficients": []}])
def test_polynomial_without_coefficients_is_an_error(filter_keys: dict[str, Any]) -> None:
    message = message_of({"filter": {"response": "polynomial", **filter_keys}})
    assert message.startswith("spectral_ds.filter.coefficients = []: must hold at least one")


def test_wrong_coefficients_are_reported_once() -> None:
    message = message_of({"filter": {"response": "polynomial", "coefficients": ["1"]}})
    assert len(message.splitlines()) == 1


# What a later version brings. An available feature leaves this list with its line in AVAILABLE.


@pytest.mark.parametrize(
    ("key", "value", "available"),
    [
        *[
            ("preset", name, "paper, observe")
            for name in config_module.PRESETS
            if name not in ("paper", "observe")
        ],
        ("graph.node", "column", "row"),
        ("graph.node", "element", "row"),
        ("graph.edges[0].family", "pair", "depth, similarity"),
        ("graph.edges[0].family", "ring", "depth, similarity"),
        ("graph.edges[0].features", "gradient", "weights"),
        ("graph.refresh_interval", 100, "0"),
        ("graphs", [{"node": "row"}], "[]"),
        *[
            ("filter.response", name, "identity, heat, tikhonov, window, polynomial")
            for name in ("lowpass", "highpass", "bandpass", "bands", "wiener", "whiten")
        ],
        ("filter.rescale", "norm", "none"),
        ("filter.apply_to", "update", "gradient"),
        ("filter.temporal", {"decay": 0.9, "amplify": 1.0}, "null"),
        ("regularizer.strength", 0.1, "0.0"),
        ("regularizer.response", "heat", "laplacian"),
        ("regularizer.ridge", 0.1, "0.0"),
        ("regularizer.coupling", "decoupled", "joint"),
        ("regularizer.reference", "zero", "pretrained"),
        ("regularizer.reference_device", "cpu", "same"),
        ("monitor.figures_interval", 50, "100"),
        ("operator.exchange", "transpose", "auto, boundary"),
        ("checkpoint.enabled", False, "true"),
    ],
)
def test_value_of_a_later_version_is_refused_as_not_available(
    key: str, value: object, available: str
) -> None:
    assert message_of(section_with(key, value)) == (
        f"spectral_ds.{key} = {json.dumps(value)}: "
        f"is not available in this version (available: {available})"
    )


def test_deleting_lines_of_available_is_all_that_the_schema_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config_module, "AVAILABLE", {"preset": AVAILABLE["preset"]})
    config = load_config(
        {
            "graphs": [{"node": "column", "edges": [{"family": "ring"}]}, {}],
            "filter": {"response": "wiener", "temporal": {"decay": 0.5}},
            "regularizer": {"strength": 0.1},
        }
    )
    assert config.graphs == (GraphConfig("column", edges=(EdgeConfig("ring"),)), GraphConfig())
    assert config.filter.temporal == TemporalConfig(decay=0.5)
    assert config.regularizer.strength == 0.1


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
