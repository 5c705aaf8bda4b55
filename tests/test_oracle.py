"""The filtered step equals the dense float64 oracle: every edge family, response and exchange."""

import functools

import numpy as np
import pytest
import tiny
from cells import one_step
from expected import EXACT, METHODS, expected_update, relative_error

# The rest of what there is, beside METHODS.
TOOLBOX = {
    "depth-heat": {
        "graph": {"edges": [{"family": "depth"}], "laplacian": "combinatorial"},
        "filter": {"response": "heat", "tau": 0.7, "strength": 0.6},
    },
    "depth-tikhonov-that-no-series-reaches": {
        "graph": {"edges": [{"family": "depth"}]},
        "filter": {"response": "tikhonov", "tau": 1e6, "strength": 1.0},
    },
    "pair-and-ring-highpass": {
        "graph": {
            "edges": [{"family": "pair", "weight": 3.0}, {"family": "ring"}],
            "laplacian": "combinatorial",
        },
        "filter": {"response": "highpass", "cutoff": 0.4, "order": 12, "strength": 1.0},
    },
    "columns-similarity-lowpass": {
        "graph": {"node": "column", "edges": [{"family": "similarity", "sketch_width": 8}]},
        "filter": {"response": "lowpass", "cutoff": 0.3, "order": 9, "strength": 1.0},
    },
    "columns-depth-and-role-bandpass": {
        "graph": {
            "node": "column",
            "edges": [
                {"family": "depth"},
                {"family": "similarity", "scope": "role", "neighbours": 5},
            ],
            "laplacian": "combinatorial",
        },
        "filter": {
            "response": "bandpass",
            "low": 0.1,
            "high": 0.6,
            "order": 10,
            "strength": 0.8,
        },
    },
    "columns-pair-bands": {
        "graph": {"node": "column", "edges": [{"family": "pair"}, {"family": "ring"}]},
        "filter": {"response": "bands", "gains": [1, 0.5, 2], "order": 11, "strength": 1.0},
    },
    "elements-ring-pair-depth-heat": {
        "graph": {
            "node": "element",
            "include": ["*.0.*k_proj*", "*.0.*q_proj*", "*.1.*k_proj*", "*norm*"],
            "edges": [{"family": "ring"}, {"family": "pair"}, {"family": "depth"}],
            "laplacian": "combinatorial",
        },
        "filter": {"response": "heat", "tau": 0.5, **EXACT},
    },
    "stack-of-rows-and-columns": {
        "graphs": [
            {"edges": [{"family": "similarity"}]},
            {"node": "column", "edges": [{"family": "similarity"}], "laplacian": "combinatorial"},
        ],
        "filter": {"response": "tikhonov", "tau": 0.3, "tolerance": 1e-7, "strength": 0.9},
    },
}
# Which way rows meet in each: rows are cut by shard boundaries everywhere but on one rank.
CELLS = {
    ("plain", 1, "best"): [*METHODS, *TOOLBOX],
    ("zero1", 3, "best"): METHODS,
    ("zero2", 2, "transpose"): [*METHODS, *TOOLBOX],
    ("zero2", 4, "boundary"): METHODS,
    ("zero3", 2, "best"): METHODS,
    ("zero3", 3, "boundary"): [*METHODS, *TOOLBOX],
    ("fsdp2", 2, "best"): METHODS,
    ("fsdp2", 3, "transpose"): [*METHODS, *TOOLBOX],
}
CASES = [(*cell, method) for cell, methods in CELLS.items() for method in methods]


# Of what only a monitored step tells, bytes are looked at here.
COUNTS_BYTES = "depth-window"


def section_of(method, exchange):
    if exchange == "boundary" and "no-series" in method:
        exchange = "best"
    monitor = {"interval": 1} if method == COUNTS_BYTES else {"enabled": False}
    section = {**METHODS, **TOOLBOX}[method]
    return {**section, "operator": {"exchange": exchange}, "monitor": monitor}


@pytest.fixture(scope="module")
def steps(ranks):
    """By cell, the facts of a step on every rank: without the plugin (None) and by each method."""

    @functools.cache
    def run(name, world_size, exchange):
        methods = CELLS[name, world_size, exchange]
        sections = [None, *(section_of(method, exchange) for method in methods)]
        by_rank = ranks(world_size).run(one_step, name, sections)
        by_method = zip(*by_rank, strict=True)
        return dict(zip([None, *methods], by_method, strict=True))

    return run


@pytest.mark.parametrize(("name", "world_size", "exchange", "method"), CASES)
def test_a_filtered_step_is_the_response_of_the_laplacian_times_the_step(
    steps, name, world_size, exchange, method
):
    found = steps(name, world_size, exchange)
    plain = found[None][0]
    section = section_of(method, exchange)
    adjacency, laplacian, expected = expected_update(section, plain)
    for result in found[method]:
        assert relative_error(result["gradients"], expected) <= 1e-5
        for parameter in plain["gradients"]:
            if not tiny.is_filtered(parameter):
                np.testing.assert_array_equal(
                    result["gradients"][parameter], plain["gradients"][parameter]
                )
        for parameter in plain["weights"].keys() - plain["gradients"].keys():  # frozen
            np.testing.assert_array_equal(result["after"][parameter], plain["weights"][parameter])
        # Whatever the world size: the same edges, and none more.
        if "graphs" not in section:
            np.testing.assert_allclose(result["laplacian"], laplacian, atol=1e-12)
            np.testing.assert_array_equal(result["laplacian"], result["laplacian"].T)
            assert result["nodes"] == len(adjacency)
            assert result["edges"] == np.count_nonzero(np.triu(adjacency))
            assert result["lambda_max"] >= np.linalg.eigvalsh(laplacian)[-1] - 1e-12
        # These cut all parameters of a role alike: a path over depth never leaves a rank.
        if method == COUNTS_BYTES and name in ("zero3", "fsdp2"):
            assert result["metrics"]["boundary_bytes"] == 0
