"""`load_config`: from what a user has written to a frozen `SpectralConfig`, complete and valid.

A preset lies over the defaults, the user's keys over the preset. What is unknown, of the wrong
type, out of range or without effect raises `SpectralConfigError`.
"""

import copy
import importlib.resources
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from spectral_ds.config.checking import check, frozen
from spectral_ds.config.schema import (
    ADAPTIVE,
    BOUNDED,
    FAMILIES_USING,
    RESPONSES_USING,
    EdgeConfig,
    FilterConfig,
    GraphConfig,
    SpectralConfig,
)
from spectral_ds.config.sources import SECTION, SpectralConfigError, plain, read_section, show


def load_config(source: Mapping[str, Any] | str | os.PathLike[str]) -> SpectralConfig:
    """Read and validate the configuration.

    Args:
        source: a dict: a DeepSpeed config with the key ``spectral_ds``, or the section itself;
            or a path: ``.yaml``/``.yml`` holds the section, bare or under the key
            ``spectral_ds``; any other file is a DeepSpeed JSON, read as DeepSpeed reads it
            (comments allowed), and must hold the section.

    Raises:
        SpectralConfigError: the file cannot be read, or at least one key or value is wrong; all of
            them are in the message, one a line; contradictions, where each is right by itself.

    >>> load_config({"filter": {"response": "tikhonov", "tau": 2}}).filter.tau
    2.0
    """
    problems: list[str] = []
    section = read_section(source, [each.name for each in fields(SpectralConfig)])
    user = check(SpectralConfig, section, SECTION, problems, _everywhere())
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
        given = () if graphs else preset.get("graph", {}).get("edges", ())
        for index, edge in enumerate(graph.get("edges", given)):
            family = edge.get("family", EdgeConfig.family)
            problems += _unused(f"{key}.edges[{index}]", EdgeConfig, edge, family)
            if family == "activations":
                problems += _of_edges_alone(f"{SECTION}.{key}", index, edge, graph)
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
    config: SpectralConfig = frozen(SpectralConfig, merged)
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
    if config.filter.rest != 1 and not config.has_activations:
        yield f"{SECTION}.filter.rest = {config.filter.rest:g}: belongs to family activations"
    if config.operator.exchange_dtype != "float32":
        dtype = f'{SECTION}.operator.exchange_dtype = "{config.operator.exchange_dtype}"'
        if penalty is not None:
            yield (
                f"{dtype}: must be float32 with a regularizer ({SECTION}.regularizer.strength = "
                f"{config.regularizer.strength:g}), which acts on weights that it would round"
            )
        if all(edge.family == "activations" for graph in config.stack for edge in graph.edges):
            yield f"{dtype}: must be float32 with family activations alone, which sums in it"
    for index, graph in enumerate(config.stack):
        key = f"{SECTION}.graphs[{index}]" if config.graphs else f"{SECTION}.graph"
        yield from _contradictions_of_activations(key, graph, responses)
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


def _contradictions_of_activations(
    key: str, graph: GraphConfig, responses: tuple[str, str | None]
) -> Iterator[str]:
    """Problems of a graph with family activations."""
    edges = [edge for edge in graph.edges if edge.family == "activations"]
    if not edges:
        return
    if len(graph.edges) > 1:
        yield (
            f"{key}.edges = {show([edge.family for edge in graph.edges])}: family activations is a "
            f"graph by itself; stack it with others in {SECTION}.graphs"
        )
    if graph.node != "column":
        yield f'{key}.node = "{graph.node}": must be column for family activations'
    for response in set(responses) & set(ADAPTIVE):
        yield f"{key}.edges[0].family = activations: not with response {response}"
    if edges[0].learn != "none" and responses[0] not in BOUNDED:
        yield (
            f"{key}.edges[0].learn = {show(edges[0].learn)}: needs {SECTION}.filter.response to be "
            f"one of {', '.join(BOUNDED)}, not {responses[0]}"
        )


def _read_preset(name: str) -> dict[str, Any]:
    return copy.deepcopy(_checked_preset(name))


@cache
def _checked_preset(name: str) -> dict[str, Any]:
    path = importlib.resources.files("spectral_ds") / "config" / "presets" / f"{name}.yaml"
    problems: list[str] = []
    preset = plain(OmegaConf.create(path.read_text("utf-8")))
    checked = check(SpectralConfig, preset, SECTION, problems)
    assert not problems, problems
    return checked


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


def _of_edges_alone(
    key: str, index: int, edge: Mapping[str, Any], graph: Mapping[str, Any]
) -> Iterator[str]:
    """Problems with what a graph of activations does not use, unless it is at its default."""
    written = {
        f"{key}.edges[{index}].weight": (edge.get("weight"), EdgeConfig.weight),
        f"{key}.laplacian": (graph.get("laplacian"), GraphConfig.laplacian),
    }
    for name, (value, default) in written.items():
        if value not in (None, default):
            yield f"{name} = {show(value)}: belongs to families of edges, not to activations"


@cache
def _everywhere() -> dict[str, str]:
    """Every key of the section, by its last name."""
    return {full.rpartition(".")[2]: full for full in _all_keys(SpectralConfig, SECTION)}


def _all_keys(schema: Any, key: str) -> Iterator[str]:
    for name, hint in get_type_hints(schema).items():
        yield f"{key}.{name}"
        index = "[0]" if get_origin(hint) is tuple else ""
        for part in (hint, *get_args(hint)):
            if is_dataclass(part) and name != "graphs":
                yield from _all_keys(part, f"{key}.{name}{index}")
