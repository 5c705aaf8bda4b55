"""Replicas whose weights come apart are told of, by the parameter that differs first."""

import pytest
import said
import torch
import torch.distributed as dist
from cells import CELLS, Training

SECTION = {
    "graph": {"edges": [{"family": "depth"}]},
    "filter": {"response": "window"},
    "monitor": {"interval": 1, "figures_interval": 100},
}
NAME = "llama.model.layers.1.mlp.up_proj.weight"


def steps_with_a_slip(name, is_slipping):
    """What is said in two steps, between which the last rank may change one weight."""
    with said.messages() as found:
        training = Training(CELLS[name], SECTION, rates=(0.5, 0.25))
        training.step()
        if is_slipping and dist.get_rank() == dist.get_world_size() - 1:
            weight = dict(training.module.named_parameters())[NAME].data
            local = weight.to_local() if hasattr(weight, "to_local") else weight
            with torch.no_grad():
                local.view(-1)[3] += 1e-3
        training.step(1)
        training.step(2)
        training.close()
    return [message for message in found if "replicas" in message]


@pytest.mark.parametrize(("name", "size"), [("ddp", 2), ("hsdp", 4), ("zero0", 2)])
def test_a_weight_that_differs_between_replicas_is_told_of_once_by_name(ranks, name, size):
    first, *others = ranks(size).run(steps_with_a_slip, name, True)
    assert len(first) == 1
    assert f"step 1: replicas do not hold the same weights: {NAME}" in first[0]
    assert others == [[]] * (size - 1)


@pytest.mark.parametrize(("name", "size"), [("ddp", 2), ("hsdp", 4), ("zero0", 2)])
def test_of_replicas_that_agree_nothing_is_said(ranks, name, size):
    assert ranks(size).run(steps_with_a_slip, name, False) == [[]] * size
