"""Everything a user can set: one strict schema, read by `load_config`.

In: a dict, a DeepSpeed JSON or a YAML file. Out: a frozen `SpectralConfig`, complete and valid.
The dataclasses below are the schema, valid for `OmegaConf.structured` too: names, types, defaults
and ranges. A preset lies over the defaults, the user's keys over the preset. What is unknown, of
the wrong type, out of range or without effect raises `SpectralConfigError`.
"""

import difflib
import hashlib
import importlib.resources
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from spectral_ds.config_sources import (
    SECTION,
    SpectralConfigError,
    plain,
    read_section,
    show,
)

# Keys that only some edge families or some responses use.
FAMILIES_USING = {
    "features": ("similarity",),
    "neighbours": ("similarity",),
    "scope": ("similarity",),
    "sketch_width": ("similarity",),
    "head_width": ("pair",),
}
RESPONSES_USING = {
    "tau": ("heat", "tikhonov"),
    "alpha": ("window",),
    "coefficients": ("polynomial",),
    "cutoff": ("lowpass", "highpass"),
    "low": ("bandpass",),
    "high": ("bandpass",),
    "gains": ("bands",),
    "bands": ("wiener", "whiten"),
    "power": ("whiten",),
}
ADAPTIVE = ("wiener", "whiten")

PRESETS = ("paper", "retain", "denoise", "gradient_smoothing", "laplacian_smoothing", "grokfast",
           "whiten", "observe")  # fmt: skip
RESPONSES = ("identity", "heat", "tikhonov", "window", "lowpass", "highpass", "bandpass",
             "polynomial", "bands", "wiener", "whiten")  # fmt: skip


def _rule(default: object, allowed: str, test: Callable[[Any], bool]) -> Any:
    return field(default=default, metadata={"allowed": allowed, "test": test})


def _choice(default: str, *allowed: str) -> Any:
    return _rule(default, f"one of {', '.join(allowed)}", lambda value: value in allowed)


def _integer(default: int, at_least: int) -> Any:
    return _rule(default, f"an integer >= {at_least}", lambda value: value >= at_least)


def _not_negative(default: float) -> Any:
    return _rule(default, "a finite number >= 0", lambda value: value >= 0)


def _unit_interval(default: float) -> Any:
    return _rule(default, "a number from 0 to 1", lambda value: 0 <= value <= 1)


def _patterns(default: tuple[str, ...], may_be_empty: bool) -> Any:
    def test(patterns: tuple[str, ...]) -> bool:
        # OmegaConf gives "${" and "???" a meaning of their own.
        return all(p and "${" not in p and p != "???" for p in patterns)

    kind = "list" if may_be_empty else "non-empty list"
    return _rule(
        default,
        f"a {kind} of shell patterns: strings which are not empty, not ??? and without ${{",
        lambda value: test(value) and (may_be_empty or len(value) > 0),
    )


@dataclass(frozen=True)
class EdgeConfig:
    """One edge family of the parameter graph."""

    family: str = _choice("similarity", "depth", "similarity", "pair", "ring")
    features: str = _choice("weights", "weights", "gradient")  # what similarity compares
    neighbours: int = _integer(8, at_least=1)  # nearest nodes each node is joined to
    scope: str = _choice("parameter", "parameter", "role")  # where neighbours are looked for
    sketch_width: int = _integer(64, at_least=0)  # length of a projected feature; 0 = never project
    # pair: rows of an attention head; 0 = from the model's own config
    head_width: int = _integer(0, at_least=0)
    weight: float = _rule(1.0, "a finite number > 0", lambda value: value > 0)  # of the family


@dataclass(frozen=True)
class GraphConfig:
    """Nodes and edges. Patterns are shell patterns on parameter names.

    A pattern that stands in `GraphConfig()` is a default and may match no parameter.
    """

    node: str = _choice("row", "row", "column", "element")
    include: tuple[str, ...] = _patterns(("*",), may_be_empty=False)
    exclude: tuple[str, ...] = _patterns(
        ("*embed*", "*lm_head*", "*classifier*", "*pooler*"), may_be_empty=True
    )
    edges: tuple[EdgeConfig, ...] = _rule((EdgeConfig(),), "a non-empty list of mappings", bool)
    laplacian: str = _choice("normalized", "normalized", "combinatorial")
    refresh_interval: int = _integer(0, at_least=0)  # steps between rebuilds; 0 = built once


@dataclass(frozen=True)
class TemporalConfig:
    """Adds amplify x the running mean of the filtered gradient (arXiv 2405.20233)."""

    decay: float = _rule(0.98, "a number >= 0 and < 1", lambda value: 0 <= value < 1)
    amplify: float = _not_negative(2.0)


@dataclass(frozen=True)
class FilterConfig:
    """The response h, where and how strongly it acts: Y = (1 - strength) X + strength h(L) X."""

    response: str = _choice("heat", *RESPONSES)
    tau: float = _not_negative(1.0)  # heat exp(-tau lambda), tikhonov 1 / (1 + tau lambda)
    # window 1 - (alpha / 2) lambda; up to 1 it is >= 0 on [0, 2], the normalized spectrum
    alpha: float = _unit_interval(0.4)
    # polynomial: of lambda^0, lambda^1, ...
    coefficients: tuple[float, ...] = _rule((), "a list of finite numbers", lambda value: True)
    # lowpass keeps, highpass drops what is below this share of [0, lambda_max]
    cutoff: float = _unit_interval(0.25)
    low: float = _unit_interval(0.0)  # bandpass keeps what is between these shares
    high: float = _unit_interval(0.5)
    # bands: of equal bands of [0, lambda_max], lowest first
    gains: tuple[float, ...] = _rule((), "a list of finite numbers", lambda value: True)
    # wiener, whiten: equal bands with a gain each
    bands: int = _rule(8, "an integer from 2 to 64", lambda value: 2 <= value <= 64)
    power: float = _not_negative(0.5)  # whiten: the gain of a band is its power to the minus this
    order: int | str = _rule(  # Chebyshev order; auto = the least within tolerance
        "auto",
        "auto or an integer from 1 to 512",
        lambda value: value == "auto" if isinstance(value, str) else 1 <= value <= 512,
    )
    # largest error of h on the spectrum under order auto
    tolerance: float = _rule(1e-3, "a number > 0 and < 1", lambda value: 0 < value < 1)
    strength: float = _unit_interval(0.5)
    rescale: str = _choice("none", "none", "norm")
    apply_to: str = _choice("gradient", "gradient", "update")
    warmup_steps: int = _integer(0, at_least=0)  # optimizer steps until full strength
    decay_steps: int = _integer(0, at_least=0)  # steps of its fall to 0 after that; 0 = it stays
    interval: int = _integer(1, at_least=1)  # filter every so many optimizer steps
    temporal: TemporalConfig | None = None


@dataclass(frozen=True)
class StatisticsConfig:
    """Running means of gradients, for similarity of gradients, adaptive responses and `snr`."""

    interval: int = _integer(10, at_least=1)  # optimizer steps between samples
    decay: float = _rule(0.99, "a number > 0 and < 1", lambda value: 0 < value < 1)  # a sample


@dataclass(frozen=True)
class RegularizerConfig:
    """The term strength x 1/2 tr(D^T (r(L) + ridge I) D), D = weights - reference."""

    strength: float = _not_negative(0.0)
    response: str = _choice("laplacian", "laplacian", *RESPONSES)  # r
    ridge: float = _not_negative(0.0)
    coupling: str = _choice("joint", "joint", "decoupled")
    reference: str = _choice("pretrained", "pretrained", "zero")
    reference_device: str = _choice("same", "same", "cpu")


@dataclass(frozen=True)
class MonitorConfig:
    """What goes to TensorBoard, and how often."""

    enabled: bool = True
    interval: int = _integer(10, at_least=1)  # optimizer steps between records
    # equal bands of frequency; the order of the band filters grows with their number
    bands: int = _rule(8, "an integer from 2 to 64", lambda value: 2 <= value <= 64)
    figures_interval: int = _integer(100, at_least=1)  # optimizer steps between figures
    folder: str = ""  # for TensorBoard files of its own; "" = where the engine writes


@dataclass(frozen=True)
class OperatorConfig:
    """How y = L x is computed on shards."""

    kernel: str = _choice("auto", "auto", "torch_sparse", "torch_csr")  # auto = the faster one
    exchange: str = _choice("auto", "auto", "boundary", "transpose")


@dataclass(frozen=True)
class CheckpointConfig:
    """The plugin's state in the engine's checkpoints."""

    enabled: bool = True  # whether it is saved and loaded with them
    strict: bool = True  # whether a state that cannot be used is an error, or a new graph is made


@dataclass(frozen=True)
class SpectralConfig:
    """The whole section. Build it with `load_config`, which validates; frozen afterwards."""

    enabled: bool = True
    preset: str = _choice("paper", *PRESETS)
    graph: GraphConfig = GraphConfig()
    graphs: tuple[GraphConfig, ...] = _rule((), "a list of mappings", lambda value: True)  # stacked
    filter: FilterConfig = FilterConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    regularizer: RegularizerConfig = RegularizerConfig()
    monitor: MonitorConfig = MonitorConfig()
    operator: OperatorConfig = OperatorConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    seed: int = _rule(0, "an integer from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)

    @property
    def stack(self) -> tuple[GraphConfig, ...]:
        """The graphs that filter one after another."""
        return self.graphs or (self.graph,)

    def digest(self) -> str:
        """SHA-256 of the configuration, hexadecimal; equal on two ranks iff all values are."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_config(source: Mapping[str, Any] | str | os.PathLike[str]) -> SpectralConfig:
    """Read and validate the configuration.

    Args:
        source: a dict: a DeepSpeed config with the key ``spectral_ds``, or the section itself;
            or a path: ``.yaml``/``.yml`` holds the section, bare or under the key
            ``spectral_ds``; any other file is a DeepSpeed JSON, read as DeepSpeed reads it
            (comments allowed), and must hold the section.

    Raises:
        SpectralConfigError: the file cannot be read, or at least one key or value is wrong; all
            problems are in the message, one a line.

    >>> load_config({"filter": {"response": "tikhonov", "tau": 2}}).filter.tau
    2.0
    """
    problems: list[str] = []
    user = _check_section(SpectralConfig, read_section(source), SECTION, problems)
    preset = _read_preset(user.get("preset", SpectralConfig.preset))
    usual = preset.get("filter", {}).get("response", FilterConfig.response)
    response = user.get("filter", {}).get("response", usual)
    if response != usual:
        for name in RESPONSES_USING:  # they were meant for the preset's own response
            preset.get("filter", {}).pop(name, None)
    penalty = (preset.get("regularizer", {}) | user.get("regularizer", {})).get("response")
    refused = {problem.partition(" = ")[0] for problem in problems}
    if not refused & {f"{SECTION}.filter.response", f"{SECTION}.regularizer.response"}:
        problems += _unused("filter", FilterConfig, user.get("filter", {}), response, penalty)
    graphs = {f"graphs[{i}]": graph for i, graph in enumerate(user.get("graphs", ()))}
    for key, graph in {"graph": user.get("graph", {}), **graphs}.items():
        for index, edge in enumerate(graph.get("edges", ())):
            family = edge.get("family", EdgeConfig.family)
            problems += _unused(f"{key}.edges[{index}]", EdgeConfig, edge, family)
    for name, of_response in {"coefficients": "polynomial", "gains": "bands"}.items():
        numbers = (preset.get("filter", {}) | user.get("filter", {})).get(name)
        key = f"{SECTION}.filter.{name}"
        if of_response in (response, penalty) and not numbers and key not in refused:
            problems.append(f"{key} = []: must hold at least one number for response {of_response}")
    if user.get("graph") and graphs:
        problems.append(
            f"{SECTION}.graphs = {show(user['graphs'])}: stands in place of {SECTION}.graph; "
            "write one of them"
        )
    if problems:
        raise SpectralConfigError("\n".join(problems))
    merged = OmegaConf.to_container(OmegaConf.merge(preset, user))
    config: SpectralConfig = _frozen(SpectralConfig, merged)
    problems += _contradictions(config)
    if problems:
        raise SpectralConfigError("\n".join(problems))
    return config


def _contradictions(config: SpectralConfig) -> Iterator[str]:
    """Problems of values that are valid each, but not together."""
    low, high = config.filter.low, config.filter.high
    penalty = config.regularizer.response if config.regularizer.strength > 0 else None
    responses = config.filter.response, penalty
    if "bandpass" in responses and low >= high:
        yield f"{SECTION}.filter.low = {low:g}: must be below {SECTION}.filter.high = {high:g}"
    for index, graph in enumerate(config.stack):
        key = f"{SECTION}.graphs[{index}]" if config.graphs else f"{SECTION}.graph"
        by_gradient = [edge for edge in graph.edges if edge.features == "gradient"]
        if by_gradient and graph.refresh_interval == 0:
            yield (
                f"{key}.refresh_interval = 0: edges by features gradient are made when the graph "
                "is rebuilt; must be an integer >= 1"
            )
        fewest = 2 * config.statistics.interval
        if by_gradient and "wiener" in responses and 0 < graph.refresh_interval < fewest:
            yield (
                f"{key}.refresh_interval = {graph.refresh_interval}: response wiener needs two "
                f"samples on each graph of features gradient; must be >= {fewest}, twice "
                f"{SECTION}.statistics.interval"
            )
        widths = sorted({edge.sketch_width for edge in by_gradient})
        if len(widths) > 1:
            yield (
                f"{key}.edges[].sketch_width = {widths}: must be the same for all edges by "
                "features gradient"
            )
        if graph.node == "element" and any(edge.family == "similarity" for edge in graph.edges):
            yield f'{key}.node = "element": family similarity has nothing to compare in one number'


def _read_preset(name: str) -> dict[str, Any]:
    path = importlib.resources.files("spectral_ds") / "filters" / "presets" / f"{name}.yaml"
    problems: list[str] = []
    preset = plain(OmegaConf.create(path.read_text("utf-8")))
    checked = _check_section(SpectralConfig, preset, SECTION, problems)
    assert not problems, problems
    return checked


class _RefusedError(ValueError):
    """What is wrong with one value."""


def _check_section(schema: Any, raw: Any, key: str, problems: list[str]) -> dict[str, Any]:
    """The keys of raw whose values are valid and available; the rest goes to problems."""
    rules = {rule.name: rule for rule in fields(schema)}
    allowed = ", ".join(rules)
    if not isinstance(raw, Mapping):
        problems.append(f"{key} = {show(raw)}: must be a mapping with keys out of {allowed}")
        return {}
    hints = get_type_hints(schema)
    valid = {}
    for name, value in raw.items():
        full = f"{key}.{name}"
        if name not in rules:
            nearest = _nearest(str(name), key, list(rules))
            problems.append(
                f"{full} = {show(value)}: unknown key; nearest: {nearest} (allowed: {allowed})"
            )
            continue
        try:
            checked = _check_value(hints[name], rules[name].metadata, value, full, problems)
            valid[name] = checked
        except _RefusedError as refused:
            problems.append(f"{full} = {show(value)}: {refused}")
    return valid


def _check_value(
    hint: Any, rule: Mapping[str, Any], raw: Any, key: str, problems: list[str]
) -> Any:
    """Raw as the type of its field, or `_RefusedError`; sections report to problems."""
    schema = next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)
    is_list = get_origin(hint) is tuple
    if schema and not is_list:
        is_null = raw is None and type(None) in get_args(hint)
        return None if is_null else _check_section(schema, raw, key, problems)
    try:
        value = tuple(_sequence(raw)) if schema else _typed(hint, raw)
        valid = rule["test"](value) if rule else True
    except (TypeError, OverflowError):
        valid = False
    if not valid:
        raise _RefusedError(f"must be {rule.get('allowed', 'true or false')}")
    if schema:
        sections = enumerate(value)
        return tuple(_check_section(schema, e, f"{key}[{i}]", problems) for i, e in sections)
    return value


def _typed(hint: Any, raw: Any) -> Any:
    """The value as the annotated type, without conversion other than int to float."""
    if get_origin(hint) is tuple:
        return tuple(_typed(get_args(hint)[0], element) for element in _sequence(raw))
    accepted = get_args(hint) or (hint,)
    if type(raw) in accepted and type(raw) is not float:
        return raw
    is_number = isinstance(raw, int | float) and not isinstance(raw, bool)
    if float in accepted and is_number and math.isfinite(raw):
        return float(raw)
    raise TypeError


def _sequence(raw: Any) -> list[Any] | tuple[Any, ...]:
    if isinstance(raw, list | tuple):
        return raw
    raise TypeError


def _frozen(hint: Any, value: Any) -> Any:
    """Checked values as the annotated dataclasses and tuples."""
    # Not OmegaConf.to_object: OmegaConf 2.3 cannot merge into a schema of frozen dataclasses.
    if isinstance(value, dict):
        schema = next(part for part in (hint, *get_args(hint)) if is_dataclass(part))
        hints = get_type_hints(schema)
        return schema(**{name: _frozen(hints[name], each) for name, each in value.items()})  # type: ignore[operator]
    if isinstance(value, list | tuple):
        return tuple(_frozen(get_args(hint)[0], each) for each in value)
    return value


def _unused(
    key: str, schema: type, raw: dict[str, Any], choice: str, also: str | None = None
) -> Iterator[str]:
    """Problems with keys which the chosen edge family or response does not use.

    A key at its default passes, so that a copy of all defaults is valid with any choice.
    """
    kind, using = (
        ("family", FAMILIES_USING) if schema is EdgeConfig else ("response", RESPONSES_USING)
    )
    for name, choices in using.items():
        default = getattr(schema, name)
        if not {choice, also} & set(choices) and raw.get(name, default) != default:
            belongs = f"belongs to {kind} {' or '.join(choices)}, not to {choice}"
            yield f"{SECTION}.{key}.{name} = {show(raw[name])}: {belongs}"


def _nearest(name: str, key: str, siblings: list[str]) -> str:
    """The key that was probably meant: a similar one here, else one elsewhere, else any here."""
    similar = difflib.get_close_matches(name, siblings, n=1)
    elsewhere = {full.rpartition(".")[2]: full for full in _all_keys(SpectralConfig, SECTION)}
    if not similar and (found := difflib.get_close_matches(name, elsewhere, n=1)):
        return elsewhere[found[0]]
    return f"{key}.{(similar or difflib.get_close_matches(name, siblings, n=1, cutoff=0.0))[0]}"


def _all_keys(schema: Any, key: str) -> Iterator[str]:
    for name, hint in get_type_hints(schema).items():
        yield f"{key}.{name}"
        index = "[0]" if get_origin(hint) is tuple else ""
        for part in (hint, *get_args(hint)):
            if is_dataclass(part) and name != "graphs":
                yield from _all_keys(part, f"{key}.{name}{index}")
