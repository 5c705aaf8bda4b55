"""Sections that many tests filter by, and what the oracle makes of an engine's step by them.

In: a section and the facts of the same step without the plugin. Out: the update that each
parameter should get.
"""

import fnmatch

import numpy as np
import oracle
import tiny

HEAD_WIDTH = 6
EXACT = {"tolerance": 1e-7, "strength": 1.0}

METHODS = {
    "similarity-heat": {
        "graph": {"edges": [{"family": "similarity", "neighbours": 3}]},
        "filter": {"response": "heat", "tau": 1.0, **EXACT},
    },
    "role-similarity-tikhonov": {
        "graph": {
            "edges": [
                {"family": "similarity", "neighbours": 4, "scope": "role", "sketch_width": 8}
            ],
            "laplacian": "combinatorial",
        },
        "filter": {"response": "tikhonov", "tau": 0.5, **EXACT, "strength": 0.7},
    },
    "depth-window": {
        "graph": {"edges": [{"family": "depth"}]},
        "filter": {"response": "window", "alpha": 0.4, "strength": 1.0},
    },
    "depth-and-similarity-polynomial": {
        "graph": {
            "edges": [
                {"family": "depth", "weight": 2.0},
                {"family": "similarity", "neighbours": 100, "weight": 0.5, "sketch_width": 0},
            ],
            "laplacian": "combinatorial",
        },
        "filter": {"response": "polynomial", "coefficients": [1, -0.2, 0.01], "strength": 1.0},
    },
}


def expected_update(section, plain):
    """h(L) times the unfiltered gradients of the filterable parameters, from the oracle alone.

    Returns:
        W and L of the (last) graph, and the update.
    """
    update = dict(plain["gradients"])
    for graph in section.get("graphs", [section.get("graph")]):
        kind, form = graph.get("node", "row"), graph.get("laplacian", "normalized")
        patterns = graph.get("include", ["*"])
        names = [
            name
            for name in plain["weights"]
            if name in update
            and tiny.is_filtered(name)
            and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        ]
        weights = {name: plain["weights"][name] for name in names}
        adjacency = oracle.adjacency_of(weights, graph["edges"], 0, kind, HEAD_WIDTH)
        laplacian = oracle.laplacian_of(adjacency, form)
        response = oracle.response_of(section["filter"], oracle.bound_of(adjacency, form))
        chosen = {name: update[name] for name in names}
        update |= oracle.apply_function(laplacian, response, chosen, kind)
    return adjacency, laplacian, update


def relative_error(got, expected, floor=1e-2):
    """The largest of any parameter, from its own largest value; NaN if any is: no bound holds then.

    Args:
        floor: of the largest value of all, which a parameter's counts as if it is less: gradients
            of queries are 600 times below an embedding's. 1 where steps are read from weights that
            are rounded coarser than that.
    """
    sizes = {name: np.abs(value).max() for name, value in expected.items()}
    least = floor * np.max(list(sizes.values()))
    errors = [np.abs(got[n] - expected[n]).max() / max(sizes[n], least) for n in expected]
    return np.max(errors)
