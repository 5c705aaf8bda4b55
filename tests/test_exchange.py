"""The boundary exchange sends each boundary element once to each rank that needs it, no more."""

from collections import Counter

import numpy as np
import pytest
import tiny

import spectral_ds

SECTIONS = {
    "similarity": {},
    "role": {"graph": {"edges": [{"family": "similarity", "neighbours": 2, "scope": "role"}]}},
    "depth": {"graph": {"edges": [{"family": "depth"}]}},
}


def plans(stage, section):
    """Per bucket: its parameters and, by peer, the (parameter, row, column) that come and go."""
    engine = tiny.make_engine({**tiny.deepspeed_config(stage), "spectral_ds": section})
    plugin = spectral_ds.plugin_of(engine)
    adjacency = plugin.graph.laplacian().toarray()
    np.fill_diagonal(adjacency, 0)
    owned = [
        (f.parameter, f.start, f.length)
        for f in plugin.engine.fragments
        if tiny.is_filtered(f.parameter)
    ]
    received, sent = [], []
    for operator in plugin.graph.operators:
        if operator.exchange is not None:
            bucket = operator.block.bucket
            for mine, runs in (
                (received, operator.exchange.receives),
                (sent, operator.exchange.sends),
            ):
                mine += [
                    (peer, *element)
                    for peer, addresses in enumerate(runs)
                    for start, end in addresses
                    for element in elements(bucket, start, end)
                ]
    facts = {
        "parameters": [(p.name, p.rows, p.width) for p in plugin.graph.parameters],
        "adjacency": adjacency,
        "owned": owned,
        "received": received,
        "sent": sent,
        "bytes_per_hop": plugin.graph.bytes_per_hop,
    }
    engine.destroy()
    return facts


def elements(bucket, start, end):
    """(parameter, flat index) of each address."""
    for address in range(start, end):
        position = np.searchsorted(bucket.first_node * bucket.width, address, side="right") - 1
        first = bucket.first_node[position] * bucket.width
        yield bucket.parameters[position].name, int(address - first)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("section", SECTIONS)
def test_each_boundary_element_comes_once_and_nothing_else(ranks, world_size, stage, section):
    results = ranks(world_size).run(plans, stage, SECTIONS[section])
    parameters = results[0]["parameters"]
    node_of, first = {}, 0
    for name, rows, _ in parameters:
        for row in range(rows):
            node_of[name, row] = first + row
        first += rows
    place_of = {node: place for place, node in node_of.items()}
    width_of = {name: width for name, _, width in parameters}
    owner = {
        (name, index): rank
        for rank, result in enumerate(results)
        for name, start, length in result["owned"]
        for index in range(start, start + length)
    }
    neighbours = {node: np.flatnonzero(row) for node, row in enumerate(results[0]["adjacency"])}
    total = 0
    for rank, result in enumerate(results):
        needed = set()
        for (name, index), its_rank in owner.items():
            if its_rank == rank:
                row, column = divmod(index, width_of[name])
                for node in neighbours[node_of[name, row]]:
                    other, other_row = place_of[node]
                    place = other, other_row * width_of[name] + column
                    if owner[place] != rank:
                        needed.add((owner[place], *place))
        came = Counter(result["received"])
        assert set(came) == needed
        assert set(came.values()) <= {1}
        total += len(needed)
        for peer, *place in needed:
            assert (rank, *place) in set(results[peer]["sent"])
    assert sum(len(result["sent"]) for result in results) == total
    assert all(result["bytes_per_hop"] == 4 * total for result in results)
    assert total > 0
