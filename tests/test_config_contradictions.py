"""Keys of the configuration that are valid alone, but not together, and what the refusal says."""

import json
from typing import Any

import pytest
from refused import message_of

from spectral_ds.config import load_config


@pytest.mark.parametrize(
    ("filter_keys", "problem"),
    [
        ({"response": "window", "tau": 2.0}, "tau = 2.0: belongs to response heat or tikhonov"),
        ({"response": "identity", "tau": 2.0}, "tau = 2.0: belongs to response heat or tikhonov"),
        ({"alpha": 0.3}, "alpha = 0.3: belongs to response window, not to heat"),
        (
            {"coefficients": [1]},
            "coefficients = [1.0]: belongs to response polynomial, not to heat",
        ),
        ({"cutoff": 0.5}, "cutoff = 0.5: belongs to response lowpass or highpass, not to heat"),
        ({"low": 0.1}, "low = 0.1: belongs to response bandpass, not to heat"),
        ({"response": "lowpass", "high": 0.6}, "high = 0.6: belongs to response bandpass, not to"),
        ({"response": "wiener", "gains": [1]}, "gains = [1.0]: belongs to response bands, not to"),
        ({"response": "bands", "gains": [1], "bands": 4}, "bands = 4: belongs to response wiener"),
        ({"response": "wiener", "power": 1}, "power = 1.0: belongs to response whiten, not to"),
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


def test_filter_key_may_be_that_of_the_regularizers_response() -> None:
    filter_keys = {"response": "identity", "tau": 2.0}
    section = {"filter": filter_keys, "regularizer": {"response": "tikhonov"}}
    assert load_config(section).filter.tau == 2.0
    filter_keys["alpha"] = 0.3
    assert message_of(section) == (
        "spectral_ds.filter.alpha = 0.3: belongs to response window, not to identity"
    )


@pytest.mark.parametrize("graph_key", ["graph", "graphs"])
@pytest.mark.parametrize(
    ("family", "key", "value", "owner"),
    [
        ("depth", "neighbours", 4, "similarity"),
        ("ring", "sketch_width", 0, "similarity"),
        ("pair", "scope", "role", "similarity"),
        ("ring", "features", "gradient", "similarity"),
        ("similarity", "head_width", 8, "pair"),
        ("depth", "head_width", 8, "pair"),
        ("similarity", "rank", 8, "activations"),
        ("ring", "keep", "generated", "activations"),
        ("depth", "learn", "training", "activations"),
        ("pair", "samples", 8, "activations"),
        ("ring", "length", 8, "activations"),
        ("ring", "tokenizer", "folder", "activations"),
    ],
)
def test_edge_key_that_the_family_does_not_use_is_an_error(
    graph_key: str, family: str, key: str, value: object, owner: str
) -> None:
    graph = {"edges": [{"family": "similarity"}, {"family": family, key: value}]}
    written, prefix = ([graph], "graphs[0]") if graph_key == "graphs" else (graph, "graph")
    assert message_of({graph_key: written}) == (
        f"spectral_ds.{prefix}.edges[1].{key} = {json.dumps(value)}: "
        f"belongs to family {owner}, not to {family}"
    )


@pytest.mark.parametrize(("response", "key"), [("polynomial", "coefficients"), ("bands", "gains")])
@pytest.mark.parametrize("part", ["filter", "regularizer"])
@pytest.mark.parametrize("is_written", [True, False])
def test_response_without_its_numbers_is_an_error(
    response: str, key: str, part: str, is_written: bool
) -> None:
    section: dict[str, dict[str, object]] = {"filter": {key: []} if is_written else {}}
    section.setdefault(part, {})["response"] = response
    assert message_of(section) == (
        f"spectral_ds.filter.{key} = []: must hold at least one number for response {response}"
    )


BY_GRADIENT = {"family": "similarity", "features": "gradient"}
REBUILT = "edges by features gradient are made when the graph is rebuilt; must be an integer >= 1"
TWO_SAMPLES = "response wiener needs two samples on each graph of features gradient; must be >="
IN_ONE_NUMBER = "family similarity has nothing to compare in one number"


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        (
            {"filter": {"response": "bandpass", "low": 0.6}},
            "filter.low = 0.6: must be below spectral_ds.filter.high = 0.5",
        ),
        (
            {"filter": {"response": "bandpass", "low": 0.25, "high": 0.25}},
            "filter.low = 0.25: must be below spectral_ds.filter.high = 0.25",
        ),
        ({"graph": {"edges": [BY_GRADIENT]}}, f"graph.refresh_interval = 0: {REBUILT}"),
        (
            {"graphs": [{}, {"edges": [{"family": "depth"}, BY_GRADIENT]}]},
            f"graphs[1].refresh_interval = 0: {REBUILT}",
        ),
        (
            {"preset": "denoise", "graph": {"refresh_interval": 0}},
            f"graph.refresh_interval = 0: {REBUILT}",
        ),
        (
            {
                "graph": {
                    "edges": [{**BY_GRADIENT, "sketch_width": 8}, BY_GRADIENT],
                    "refresh_interval": 1,
                }
            },
            "graph.edges[].sketch_width = [8, 64]: must be the same for all edges by features "
            "gradient",
        ),
        (
            {"preset": "denoise", "graph": {"refresh_interval": 1}},
            f"graph.refresh_interval = 1: {TWO_SAMPLES} 2, twice spectral_ds.statistics.interval",
        ),
        (
            {
                "graphs": [{}, {"edges": [BY_GRADIENT], "refresh_interval": 9}],
                "statistics": {"interval": 5},
                "regularizer": {"response": "wiener", "strength": 1.0},
            },
            f"graphs[1].refresh_interval = 9: {TWO_SAMPLES} 10, twice "
            "spectral_ds.statistics.interval",
        ),
        (
            {"regularizer": {"strength": 0.1}, "operator": {"exchange_dtype": "bfloat16"}},
            'operator.exchange_dtype = "bfloat16": must be float32 with a regularizer '
            "(spectral_ds.regularizer.strength = 0.1), which acts on weights that it would round",
        ),
        (
            {"preset": "retain", "operator": {"exchange_dtype": "bfloat16"}},
            'operator.exchange_dtype = "bfloat16": must be float32 with family activations alone, '
            "which sums in it",
        ),
        ({"graph": {"node": "element"}}, f'graph.node = "element": {IN_ONE_NUMBER}'),
        ({"graphs": [{"node": "element"}]}, f'graphs[0].node = "element": {IN_ONE_NUMBER}'),
        (
            {"preset": "whiten", "graph": {"node": "element"}},
            f'graph.node = "element": {IN_ONE_NUMBER}',
        ),
        (
            {"graph": {"node": "row"}, "graphs": [{"node": "column"}]},
            'graphs = [{"node": "column"}]: stands in place of spectral_ds.graph; '
            "write one of them",
        ),
    ],
)
def test_values_that_contradict_each_other_are_an_error(
    section: dict[str, Any], problem: str
) -> None:
    assert message_of(section) == f"spectral_ds.{problem}"


ACTIVATIONS = {"family": "activations"}
COLUMNS = {"node": "column", "edges": [ACTIVATIONS]}
LEARNS = {"node": "column", "edges": [{**ACTIVATIONS, "learn": "training"}]}


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        (
            {"graph": {"edges": [ACTIVATIONS]}},
            'graph.node = "row": must be column for family activations',
        ),
        (
            {"graphs": [{}, {**COLUMNS, "node": "element"}]},
            'graphs[1].node = "element": must be column for family activations',
        ),
        (
            {"graph": {"node": "column", "edges": [{"family": "ring"}, ACTIVATIONS]}},
            'graph.edges = ["ring", "activations"]: family activations is a graph by itself; stack '
            "it with others in spectral_ds.graphs",
        ),
        (
            {"graph": COLUMNS, "filter": {"response": "wiener"}},
            "graph.edges[0].family = activations: not with response wiener",
        ),
        (
            {"graph": COLUMNS, "regularizer": {"response": "whiten", "strength": 1.0}},
            "graph.edges[0].family = activations: not with response whiten",
        ),
        (
            {"graph": LEARNS, "filter": {"response": "window"}},
            'graph.edges[0].learn = "training": needs spectral_ds.filter.response to be one of '
            "identity, heat, tikhonov, not window",
        ),
        (
            {"filter": {"rest": 0.6}},
            "filter.rest = 0.6: belongs to family activations",
        ),
        (
            {"preset": "retain", "graph": {"laplacian": "combinatorial"}},
            'graph.laplacian = "combinatorial": belongs to families of edges, not to activations',
        ),
        (
            {"graph": {**COLUMNS, "laplacian": "combinatorial"}},
            'graph.laplacian = "combinatorial": belongs to families of edges, not to activations',
        ),
        (
            {"graph": {"node": "column", "edges": [{**ACTIVATIONS, "weight": 2.0}]}},
            "graph.edges[0].weight = 2.0: belongs to families of edges, not to activations",
        ),
    ],
)
def test_what_contradicts_activations_is_an_error(section: dict[str, Any], problem: str) -> None:
    assert message_of(section) == f"spectral_ds.{problem}"


def test_contradictions_are_reported_together() -> None:
    graph = {"node": "element", "edges": [BY_GRADIENT]}
    section = {"graph": graph, "filter": {"response": "bandpass", "low": 1}}
    keys = [line.partition(" = ")[0] for line in message_of(section).splitlines()]
    assert keys == [
        "spectral_ds.filter.low",
        "spectral_ds.graph.refresh_interval",
        "spectral_ds.graph.node",
    ]


@pytest.mark.parametrize(
    "section",
    [
        {"graphs": [], "graph": {"node": "column"}},
        {"graphs": [{"node": "column"}], "graph": {}},
        {"preset": "denoise", "graphs": [{"node": "column"}, {"node": "row"}]},
        {"graph": {"edges": [BY_GRADIENT, {"family": "similarity", "sketch_width": 8}],
                   "refresh_interval": 1}},
        {"graph": {"node": "element", "edges": [{"family": "ring"}]}},
        {"preset": "whiten", "graph": {"edges": [{"family": "depth"}], "refresh_interval": 0}},
        {"preset": "whiten", "graph": {"refresh_interval": 1}},
        {"preset": "denoise", "graph": {"refresh_interval": 2}},
        {"graph": {"refresh_interval": 1}, "filter": {"response": "wiener"}},
        {"graph": {"edges": [BY_GRADIENT], "refresh_interval": 1},
         "regularizer": {"response": "wiener"}},
    ],
)  # fmt: skip
def test_what_only_looks_like_a_contradiction_loads(section: dict[str, Any]) -> None:
    assert load_config(section) is not None
