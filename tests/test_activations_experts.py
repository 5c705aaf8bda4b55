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
from torch.overrides import TorchFunctionMode

from spectral_ds.coactivation import calibrate, text_batches, user_batches
from spectral_ds.coactivation.rows import Rows
from spectral_ds.graph import parameter_nodes
from spectral_ds.sharding import Communicator
from spectral_ds.stack import facts_of, sites_among


def nodes_of(model):
    """Of all matrices, the columns."""
    named = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    shapes = {name: tuple(p.shape) for name, p in named.items()}
    return parameter_nodes(shapes, "column", facts_of([model], named).storage).values()


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


KINDS = ["Mixtral", "Qwen3Moe", "Olmoe", "GptOss"]


def expected_of(model, ids, mask=None):
    """Operators of a model called with token ids: of each expert, each router and all others.

    Args:
        mask: of padding, which counts nowhere.
    """
    seen = {}
    counted = np.ones(ids.numel(), bool) if mask is None else mask.reshape(-1).bool().numpy()

    def note(name):
        def hook(_, args, kwargs):
            hidden, chosen, *_ = (*args, *kwargs.values())
            hidden = hidden.reshape(-1, hidden.shape[-1])
            seen[name] = hidden.double().numpy()[counted], chosen.numpy()[counted]

        return hook

    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if hasattr(module, "gate_up_proj")
    ]
    linear = inputs_of(model, lambda m: m(input_ids=ids, attention_mask=mask))
    for handle in handles:
        handle.remove()
    del linear["lm_head"]
    expected = operators({name: x[counted] for name, x in linear.items()})
    modules = dict(model.named_modules())
    for name, (hidden, chosen) in seen.items():
        for (attribute, expert), x in inputs_of_experts(modules[name], hidden, chosen).items():
            expected[f"{name}.{attribute}", expert] = operator_of(x, RANK)
        block = name.removesuffix(".experts")
        [router] = [n for n, _ in model.named_parameters() if n.startswith(block)
                    and n.endswith(("gate.weight", "router.weight"))]  # fmt: skip
        expected[router, 0] = operator_of(hidden, RANK)
    return expected


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [*((kind, "grouped_mm") for kind in KINDS), ("Mixtral", "eager"), ("Mixtral", "batched_mm")],
)
def test_an_expert_has_the_graph_of_the_tokens_routed_to_it(kind, implementation):
    model = tiny.experts(kind)
    model.set_experts_implementation(implementation)
    ids = ids_of(model, 1, 3)
    expected = expected_of(model, ids)
    assert len([key for key in expected if "down_proj" in key[0]]) < 8  # some got no token
    before = model(input_ids=ids).logits
    plugin, optimizer = keeping(model, [{"input_ids": ids}])
    assert_operators(plugin.graph, expected)
    assert model.get_experts_implementation() == {"": implementation}
    assert torch.equal(model(input_ids=ids).logits, before)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if n[-5:] == "_proj"}
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    is_turned = kind == "GptOss"  # (inputs, outputs)
    for name, weight in weights.items():
        parameter = model.get_parameter(name)
        moved = ((weight - parameter.detach()) / RATE).double().numpy()
        for expert, gradient in enumerate(parameter.grad.double().numpy()):
            gradient = gradient.T if is_turned else gradient
            wanted = gradient
            if (name, expert) in expected:  # one that got no token stays free
                damping = np.eye(gradient.shape[1]) + 1.5 * expected[name, expert]
                wanted = 0.2 * gradient + 0.8 * gradient @ np.linalg.inv(damping)
            found = moved[expert].T if is_turned else moved[expert]
            np.testing.assert_allclose(found, wanted, atol=1e-4, equal_nan=False)
    plugin.detach()


@pytest.mark.parametrize(
    ("kind", "side"), [*((kind, "left") for kind in KINDS), ("Mixtral", "right")]
)
def test_padding_enters_no_expert_and_no_router(kind, side):
    model = tiny.experts(kind)
    ids = ids_of(model, 5, 6)
    mask = torch.ones_like(ids)
    for row, length in ((0, 2), (2, 5), (3, 1)):
        mask[row, length:] = 0
    mask = mask.flip(1) if side == "left" else mask
    expected, whole = expected_of(model, ids, mask), expected_of(model, ids)
    plugin, _ = keeping(model, [{"input_ids": ids, "attention_mask": mask}])
    assert_operators(plugin.graph, expected)
    for part in ("experts.gate_up_proj", "gate.weight" if kind != "GptOss" else "router.weight"):
        assert any(  # it would be seen
            np.abs(operator - whole[key]).max() > 1e-2
            for key, operator in expected.items()
            if key[0].endswith(part)
        )
    plugin.detach()


def test_texts_of_unequal_length_are_called_together():
    """By their pieces one at a time, without padding."""
    model = tiny.experts("Mixtral")
    pieces = [ids_of(model, 1, length)[0].tolist() for length in (6, 2, 5, 1, 3)]

    def tokenizer(texts, **_):
        return {"input_ids": [pieces[int(text)] for text in texts]}

    tokenizer.bos_token_id = None
    batches = text_batches(model, list("01234"), tokenizer, 5, 6, 0)
    assert len(batches) == 1
    sites = sites_among([model], dict(model.named_parameters()), nodes_of(model))
    alone = Communicator.alone(torch.device("cpu"))
    found = calibrate(model, sites, batches, RANK, 0, alone, lambda _: None)
    each = user_batches([{"input_ids": torch.tensor([piece])} for piece in pieces])
    wanted = calibrate(model, sites, each, RANK, 0, alone, lambda _: None)
    assert found.leaders == wanted.leaders
    for name, spectra in wanted.spectra.items():
        for one, other in zip(found.spectra[name], spectra, strict=True):
            assert (one is None) == (other is None)
            if other is not None:
                np.testing.assert_allclose(one.matrix(), other.matrix(), atol=1e-4)


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
    assert "no finite activation has entered 0.up_proj" in caplog.records[-1].getMessage()
    plugin.detach()


# Which vectors count

FOLLOWED = {
    "flattened": lambda x: x.view(-1, 6),
    "picked": lambda x: x.reshape(-1, 6)[torch.tensor([7, 0, 3, 3])],
    "all, in another order": lambda x: x.flatten(0, 1)[torch.arange(8).flip(0)],
    "masked": lambda x: x[torch.tensor([True, False])],
    "some columns": lambda x: x[..., ::2] * 2.0,
    "sorted by a number": lambda x: x.flatten(0, 1).index_select(0, torch.randperm(8)),
    "turned": lambda x: x.transpose(0, 1).contiguous(),
    "in parts": lambda x: x.reshape(8, 6).split((3, 5))[1],
    "half of the columns": lambda x: x.chunk(2, dim=-1)[0],
    "repeated": lambda x: x.reshape(8, 6).repeat(3, 1).view(3, 8, 6),
}


class Following(TorchFunctionMode):
    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            self.rows.follow(func, args, kwargs or {}, result)
        return result


@pytest.mark.parametrize("how", FOLLOWED)
def test_vectors_that_do_not_count_are_followed(how):
    """The first element of each vector is not 0 where it counts."""
    torch.manual_seed(0)
    counts = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]]).bool()
    x = torch.ones(2, 4, 6) * counts[..., None]
    rows = Rows()
    rows.set(x, counts)
    with Following(rows):
        found = FOLLOWED[how](x)
    assert torch.equal(rows.of(found), found[..., 0] != 0)
    assert not rows.of(found).all()
