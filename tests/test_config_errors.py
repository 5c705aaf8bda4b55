"""Keys and values that the configuration refuses, each alone, and what the refusal says."""

from typing import Any

import pytest
from refused import message_of


def section_with(key: str, value: object) -> dict[str, Any]:
    """The section that holds one key; ``graph.edges[0].x`` makes an edge."""
    for part in reversed(key.split(".")):
        value = {"edges": [value]} if part == "edges[0]" else {part: value}
    assert isinstance(value, dict)
    return value


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
        ("graph.edges[0].head_width", -1, "-1", "must be an integer >= 0"),
        ("graph.edges[0].rank", 0, "0", "must be an integer >= 1"),
        ("graph.edges[0].samples", 0, "0", "must be an integer >= 1"),
        ("graph.edges[0].length", 1.5, "1.5", "must be an integer >= 1"),
        ("graph.edges[0].keep", "", '""', "must be random, generated, given or the name of a file"),
        ("graph.edges[0].keep", None, "null", "must be random, generated, given or the name of"),
        ("graph.edges[0].keep", "a${", '"a${"', "or the name of a file or folder, without ${"),
        ("graph.edges[0].tokenizer", 3, "3", "must be a string without ${"),
        ("monitor.folder", "runs/${", '"runs/${"', "must be a string without ${"),
        ("graph.edges[0].learn", "", '""', "must be none, training or the name of a file"),
        ("graph.refresh_interval", -1, "-1", "must be an integer >= 0"),
        ("graphs", {"node": "row"}, '{"node": "row"}', "must be a list of mappings"),
        ("graphs", None, "null", "must be a list of mappings"),
        ("filter.tau", -0.1, "-0.1", "must be a finite number >= 0"),
        ("filter.tau", float("nan"), "NaN", "must be a finite number >= 0"),
        ("filter.tau", 10**400, "1000", "must be a finite number >= 0"),
        ("filter.alpha", 1.1, "1.1", FROM_0_TO_1),
        ("filter.alpha", -0.1, "-0.1", FROM_0_TO_1),
        ("filter.coefficients", [float("nan")], "[NaN]", "must be a list of finite numbers"),
        ("filter.cutoff", 1.5, "1.5", FROM_0_TO_1),
        ("filter.low", -0.5, "-0.5", FROM_0_TO_1),
        ("filter.high", 2, "2", FROM_0_TO_1),
        ("filter.gains", ["1"], '["1"]', "must be a list of finite numbers"),
        ("filter.gains", [float("inf")], "[Infinity]", "must be a list of finite numbers"),
        ("filter.bands", 1, "1", "must be an integer from 2 to 64"),
        ("filter.bands", 65, "65", "must be an integer from 2 to 64"),
        ("filter.power", -1, "-1", "must be a finite number >= 0"),
        ("filter.order", 0, "0", "must be best or an integer from 1 to 512"),
        ("filter.order", 513, "513", "must be best or an integer from 1 to 512"),
        ("filter.order", "8", '"8"', "must be best or an integer from 1 to 512"),
        ("filter.order", 8.0, "8.0", "must be best or an integer from 1 to 512"),
        ("filter.order", True, "true", "must be best or an integer from 1 to 512"),
        ("filter.tolerance", 0.0, "0.0", "must be a number > 0 and < 1"),
        ("filter.tolerance", 1, "1", "must be a number > 0 and < 1"),
        ("filter.strength", -0.5, "-0.5", FROM_0_TO_1),
        ("filter.strength", 1.5, "1.5", FROM_0_TO_1),
        ("filter.warmup_steps", -1, "-1", "must be an integer >= 0"),
        ("filter.decay_steps", -1, "-1", "must be an integer >= 0"),
        ("filter.interval", 0, "0", "must be an integer >= 1"),
        ("filter.rest", -0.1, "-0.1", "must be a finite number >= 0"),
        ("filter.temporal.amplify", -1.0, "-1.0", "must be a finite number >= 0"),
        ("statistics.interval", 0, "0", "must be an integer >= 1"),
        ("statistics.decay", 0, "0", "must be a number > 0 and < 1"),
        ("statistics.decay", 1, "1", "must be a number > 0 and < 1"),
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
        ("preset", "papper", '"papper"', "must be one of paper, retain, retain_lm, anchor_lm"),
        ("graph.node", "rows", '"rows"', "must be one of row, column, element"),
        ("graph.laplacian", "norm", '"norm"', "must be one of normalized, combinatorial"),
        ("graph.edges[0].family", "deep", '"deep"', "must be one of depth, similarity, pair, ring"),
        ("graph.edges[0].features", "w", '"w"', "must be one of weights, gradient"),
        ("graph.edges[0].scope", "all", '"all"', "must be one of parameter, role"),
        ("filter.response", "low", '"low"', "must be one of identity, heat, tikhonov, window"),
        ("filter.rescale", "l2", '"l2"', "must be one of none, norm"),
        ("filter.apply_to", "loss", '"loss"', "must be one of gradient, update"),
        ("regularizer.response", "L", '"L"', "must be one of laplacian, identity"),
        ("regularizer.coupling", "both", '"both"', "must be one of joint, decoupled"),
        ("regularizer.reference", "one", '"one"', "must be one of pretrained, zero"),
        ("regularizer.reference_device", "tpu", '"tpu"', "must be one of same, cpu"),
        ("operator.kernel", "csr", '"csr"', "one of best, torch_sparse, torch_csr, embedding_bag"),
        ("operator.exchange", "ring", '"ring"', "must be one of best, boundary, transpose"),
        ("operator.exchange_dtype", "fp8", '"fp8"', "must be one of float32, bfloat16"),
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
        ("filter.cut_off", "filter.cutoff"),
        ("statistic", "statistics"),
        ("graph.edges[0].headwidth", "graph.edges[0].head_width"),
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


def test_key_within_graphs_is_named_with_its_index() -> None:
    graphs = [{}, {"nodes": "row", "edges": [{"family": "ring", "neighbours": 0}]}]
    first, second = message_of({"graphs": graphs}).splitlines()
    assert first.startswith('spectral_ds.graphs[1].nodes = "row": unknown key; nearest: ')
    assert second.startswith("spectral_ds.graphs[1].edges[0].neighbours = 0: must be an integer")


def test_unknown_key_that_is_no_string_is_an_error() -> None:
    assert "spectral_ds.filter.3 = 1: unknown key" in message_of({"filter": {3: 1}})


def test_all_problems_are_reported_one_a_line() -> None:
    section = {
        "sead": 1,
        "filter": {"order": 0, "response": "lowpas", "tau": 2.0},
        "graph": {"edges": [{"family": "depth"}, {"neighbours": -1}, {"family": "rings"}]},
        "graphs": [{"node": "rows"}],
        "monitor": {"bands": 1},
    }
    keys = [line.partition(" = ")[0] for line in message_of(section).splitlines()]
    assert keys == [
        "spectral_ds.sead",
        "spectral_ds.filter.order",
        "spectral_ds.filter.response",
        "spectral_ds.graph.edges[1].neighbours",
        "spectral_ds.graph.edges[2].family",
        "spectral_ds.graphs[0].node",
        "spectral_ds.monitor.bands",
        "spectral_ds.graphs",
    ]


def test_wrong_coefficients_are_reported_once() -> None:
    message = message_of({"filter": {"response": "polynomial", "coefficients": ["1"]}})
    assert len(message.splitlines()) == 1
