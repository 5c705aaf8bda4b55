"""What enters the matrices of stacked experts, by dense numpy."""

import logging

import numpy as np
import pytest
import tiny
import torch
from activations import (
    RANK,
    RATE,
    assert_operators,
    ids_of,
    inputs_of,
    keeping,
    operator_of,
    operators,
)
from torch import nn


def silu(x):
    return x / (1 + np.exp(-x))


def inputs_of_experts(module, hidden, chosen):
    """By parameter and expert: the tokens routed to it, and what enters its second matrix."""
    up = module.gate_up_proj.detach().double().numpy()
    found = {}
    for expert in range(len(up)):
        x = hidden[(chosen == expert).any(axis=1)]
        if len(x) == 0:
            continue
        if hasattr(module, "gate_up_proj_bias"):  # GPT-OSS: (inputs, outputs), gate, up, gate, up
            y = x @ up[expert] + module.gate_up_proj_bias.detach().double().numpy()[expert]
            gate, other = np.minimum(y[:, ::2], module.limit), y[:, 1::2]
            inner = (np.clip(other, -module.limit, module.limit) + 1) * (
                gate / (1 + np.exp(-gate * module.alpha))
            )
        else:
            gate, other = np.split(x @ up[expert].T, 2, axis=1)
            inner = silu(gate) * other
        found["gate_up_proj", expert], found["down_proj", expert] = x, inner
    return found


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_an_expert_has_the_graph_of_the_tokens_routed_to_it(kind, implementation, caplog):
    model = tiny.experts(kind)
    model.set_experts_implementation(implementation)
    ids = ids_of(model, 1, 3)
    seen = {}

    def note(name):
        def hook(_, args, kwargs):
            hidden, chosen, *_ = (*args, *kwargs.values())
            seen[name] = hidden.double().numpy(), chosen.numpy()

        return hook

    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if hasattr(module, "gate_up_proj")
    ]
    linear = inputs_of(model, lambda m: m(input_ids=ids))
    for handle in handles:
        handle.remove()
    del linear["lm_head"]
    expected = operators(linear)
    modules = dict(model.named_modules())
    for name, (hidden, chosen) in seen.items():
        for (attribute, expert), x in inputs_of_experts(modules[name], hidden, chosen).items():
            expected[f"{name}.{attribute}", expert] = operator_of(x, RANK)
    assert len([key for key in expected if "down_proj" in key[0]]) < 8  # some got no token
    before = model(input_ids=ids).logits
    plugin, optimizer = keeping(model, [{"input_ids": ids}])
    assert_operators(plugin.graph, expected)
    assert model.get_experts_implementation() == {"": implementation}
    assert torch.equal(model(input_ids=ids).logits, before)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if n[-5:] == "_proj"}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, weight in weights.items():
        moved = (weight - model.get_parameter(name).detach()) / RATE
        for expert in range(4):  # one that got no token stays free
            is_free = torch.allclose(moved[expert], torch.ones(()))
            assert is_free == ((name, expert) not in expected)
    plugin.detach()


class BatchedExperts(nn.Module):
    """All at once, in a way of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up_proj = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x):
        chosen = torch.arange(len(x)) % 3
        first = nn.functional.linear(x, self.up_proj[-1])  # one, from the end
        return first + torch.einsum("bi,boi->bo", x, self.up_proj[chosen]) + self.up_proj[:2].sum()


def test_experts_that_compute_otherwise_are_named_where_nothing_of_them_is_seen(caplog):
    caplog.set_level(logging.WARNING, "spectral_ds")
    model, x = nn.Sequential(BatchedExperts(), nn.Linear(4, 4)), torch.randn(9, 5)
    plugin, _ = keeping(model, [x])
    wanted = operator_of(x.double().numpy(), RANK)
    inner = operator_of(model[0](x).detach().double().numpy(), RANK)
    assert_operators(plugin.graph, {("0.up_proj", 2): wanted, ("1.weight", 0): inner})
    plugin.detach()
    model[0].forward = lambda x: torch.einsum("bi,oi->bo", x, model[0].up_proj.sum(0))
    plugin, _ = keeping(model, [x])
    assert "no activation has entered 0.up_proj" in caplog.records[-1].getMessage()
    plugin.detach()
