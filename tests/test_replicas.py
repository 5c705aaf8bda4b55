"""Ranks that should hold the same weights, or have the same graph, and do not.

Replicas whose weights come apart are told of, by the parameter that differs first. Another graph on
some rank is an error.
"""

import numpy as np
import pytest
import said
import torch
import torch.distributed as dist
from cells import CELLS, Training

from spectral_ds.laplacian import GraphsDifferError, require_one_graph

SECTION = {
    "graph": {"edges": [{"family": "depth"}]},
    "filter": {"response": "window"},
    "monitor": {"interval": 1, "figures_interval": 100},
}
NAME = "llama.model.layers.1.mlp.up_proj.weight"


def steps_with_a_slip(name):
    """What is said in four steps, amid which the last rank changes one weight."""
    with said.messages() as found:
        training = Training(CELLS[name], SECTION, rates=(0.5, 0.25))
        training.train(2)
        if dist.get_rank() == dist.get_world_size() - 1:
            weight = dict(training.module.named_parameters())[NAME].data
            local = weight.to_local() if hasattr(weight, "to_local") else weight
            with torch.no_grad():
                local.view(-1)[3] += 1e-3
        training.train(2, first=2)
        training.close()
    return [message for message in found if "replicas" in message]


@pytest.mark.parametrize(("name", "size"), [("ddp", 2), ("hsdp", 4), ("zero0", 2)])
def test_a_weight_that_differs_between_replicas_is_told_of_once_by_name(ranks, name, size):
    first, *others = ranks(size).run(steps_with_a_slip, name)
    assert len(first) == 1
    assert f"step 2: replicas do not hold the same weights: {NAME}" in first[0]
    assert others == [[]] * (size - 1)


SIMILAR = {"graph": {"edges": [{"family": "similarity"}]}, "monitor": {"enabled": False}}


def refreshed_after_a_slip():
    """Replicas rebuild their graphs at a step before which the last one's weights have changed."""
    section = {**SIMILAR, "graph": {**SIMILAR["graph"], "refresh_interval": 1}}
    training = Training(CELLS["ddp"], section, rates=(0.5, 0.25))
    training.step()
    if dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            dict(training.module.named_parameters())[NAME][0, 0] += 1e-3
    try:
        training.step(1)
    finally:
        training.close()


def test_replicas_that_make_different_graphs_end_on_all_ranks(ranks):
    for outcome in ranks(2).outcomes(refreshed_after_a_slip):
        assert outcome.kind == "GraphsDifferError"
        assert "replicas have made different graphs" in outcome.message


def told_of_an_edge_with_two_weights():
    """Whether each of two ranks is told of one that has computed another last bit."""
    training = Training(CELLS["fsdp2"], SIMILAR)
    graph, engine = training.plugin.graph, training.plugin.engine
    require_one_graph(graph, engine.communicator, engine.everyone)
    if dist.get_rank() == 1:
        weight = graph.groups[0].edges.weight
        weight[-1] = np.nextafter(weight[-1], 2)
    with pytest.raises(GraphsDifferError, match="two directions of edges between ranks"):
        require_one_graph(graph, engine.communicator, engine.everyone)
    training.close()


def test_an_edge_that_has_another_weight_from_its_other_end_is_an_error_of_all(ranks):
    ranks(2).run(told_of_an_edge_with_two_weights)
