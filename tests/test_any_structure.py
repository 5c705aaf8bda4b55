"""Modules of any structure are attached and filtered as the oracle does, or refused by name."""

import numpy as np
import oracle
import pytest
import torch
from any_model import quick
from hypothesis import event, given
from hypothesis import strategies as st
from torch import nn

import spectral_ds
from spectral_ds.engines import UnsupportedEngineError

# What a bit of a number is worth, beside float32, in which filters compute.
TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-5,
    torch.complex64: 1e-5,
    torch.float16: 3e-3,
    torch.bfloat16: 0.02,
}
NAMES = st.sampled_from(["weight", "bias", "0", "17", "layers", "a b", "ü", "w*", "[x]"])
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
FILTER = {"response": "tikhonov", "tau": 1.5, "strength": 0.7, "tolerance": 1e-7}


@st.composite
def parameters(draw):
    """One with a value, that may be frozen."""
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    value = random_of(draw(SHAPES), dtype, generator)
    if value.ndim > 1 and draw(st.integers(0, 9)) == 0:
        value = value.transpose(0, 1)  # which does not lie in order
    return nn.Parameter(value, requires_grad=draw(st.integers(0, 3)) > 0)


@st.composite
def modules(draw, depth=3):
    """A tree in which some parameters are there twice."""
    module = nn.Module()
    for name, parameter in draw(st.dictionaries(NAMES, parameters(), max_size=3)).items():
        module.register_parameter(name, parameter)
    if depth:
        below = st.dictionaries(NAMES, modules(depth - 1), max_size=2)
        for name, child in draw(below).items():
            if not hasattr(module, name):
                module.add_module(name, child)
    own = list(module.parameters())
    if own and draw(st.booleans()) and not hasattr(module, "tied"):
        module.register_parameter("tied", draw(st.sampled_from(own)))
    return module


@st.composite
def gradients_of(draw, model):
    """By name; some parameters got none."""
    found, generator = {}, torch.Generator().manual_seed(draw(st.integers(0, 99)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and draw(st.integers(0, 4)):
            found[name] = random_of(parameter.shape, parameter.dtype, generator)
    return found


def random_of(shape, dtype, generator):
    """Complex numbers have an imaginary part."""
    drawn = dtype if dtype.is_complex else torch.float32
    return torch.randn(shape, generator=generator, dtype=drawn).to(dtype)


@quick
@given(modules(), st.sampled_from(["row", "column", "element"]), st.data())
def test_any_structure_is_filtered_or_refused_by_name(model, node, data):
    families = data.draw(st.lists(st.sampled_from(["ring", "depth"]), min_size=1, unique=True))
    edges = [{"family": family} for family in families]
    section = {
        "graph": {"node": node, "edges": edges, "exclude": []},
        "filter": FILTER,
        "monitor": {"enabled": False},
    }
    every = list(model.parameters())
    if not every:
        return
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    usable = [each for each in every if each.requires_grad and each.numel()]
    is_refused = not usable or not all(each.is_contiguous() for each in usable)
    optimizer = torch.optim.SGD(every, lr=1.0)
    if is_refused:
        event("refused")
        with pytest.raises(UnsupportedEngineError) as refused:
            spectral_ds.attach(model, optimizer, section)
        assert not usable or any(f"'{name}'" in str(refused.value) for name in before)
        return
    plugin = spectral_ds.attach(model, optimizer, section)
    gradients = data.draw(gradients_of(model))
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone() if name in gradients else None
    plugin.filter_gradients()
    inside = [parameter.name for parameter in plugin.graph.parameters]
    event(f"filtered {min(len(inside), 4)}")
    named = dict(model.named_parameters())
    numbers = {id(each) for each in usable}
    assert sorted(inside) == sorted(name for name, each in named.items() if id(each) in numbers)
    zeros = {name: np.zeros_like(real(named[name])) for name in inside}
    signal = {n: real(gradients[n]) if n in gradients else zeros[n] for n in inside}
    laplacian = oracle.laplacian_of(oracle.adjacency_of(zeros, edges, kind=node))
    expected = oracle.apply_function(laplacian, oracle.response_of(FILTER), signal, node)
    scale = max((np.abs(each).max() for each in signal.values() if each.size), default=0.0)
    for name, parameter in named.items():
        assert torch.equal(parameter, before[name])
        if name not in gradients:
            assert parameter.grad is None or not parameter.grad.any()
        elif name in inside:
            off = np.abs(real(parameter.grad) - expected[name]).max(initial=0)
            assert off <= TOLERANCE[parameter.dtype] * scale, name
        else:
            assert torch.equal(parameter.grad, gradients[name])
    plugin.detach()


def real(tensor):
    """In float64; a complex number is two in the last dimension."""
    tensor = tensor.detach()
    if tensor.is_complex():
        parts = torch.view_as_real(tensor.resolve_conj())
        tensor = parts.reshape(*tensor.shape[:-1], -1) if tensor.ndim else parts
    return tensor.double().numpy()
