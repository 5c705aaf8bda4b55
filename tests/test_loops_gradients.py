"""Gradients that are not plain: complex, in float64, sparse, of other strides than their parameter.

All on one process; numbers against the dense oracle.
"""

from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import tiny
import torch
from torch import nn

import spectral_ds
from spectral_ds.config import SpectralConfigError
from spectral_ds.engines import UnsupportedEngineError
from spectral_ds.engines.deepspeed_replicated import DeepSpeedReplicatedEngine
from spectral_ds.engines.torch_engine import TorchEngine
from spectral_ds.engines.views import refuse_complex

EDGES = [{"family": "similarity", "neighbours": 2}]
FILTER = {"response": "heat", "tau": 2.0, "strength": 0.8, "tolerance": 1e-7}
SECTION = {"graph": {"edges": EDGES, "exclude": []}, "filter": FILTER, "monitor": {"interval": 1}}
RATE = 64.0  # large, so that weights before minus after hold the gradient precisely


def real(tensor):
    """Complex numbers as two columns each, in float64."""
    tensor = tensor.detach()
    if tensor.is_complex():
        parts = torch.view_as_real(tensor.resolve_conj())
        shape = (*tensor.shape[:-1], 2 * tensor.shape[-1]) if tensor.dim() else (2,)
        tensor = parts.reshape(shape)
    return tensor.double().numpy().copy()


def filtered(weights, gradients, **changes):
    """What the dense oracle makes of the gradients, by name."""
    laplacian = oracle.laplacian_of(oracle.adjacency_of(weights, EDGES, **changes))
    return oracle.apply_function(laplacian, oracle.response_of(FILTER), gradients)


def assert_close(found, expected):
    for name, right in expected.items():
        scale = max(np.abs(right).max(), 1e-30)
        assert np.abs(found[name] - right).max() <= 1e-5 * scale, name


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.turn = nn.Parameter(torch.randn(7, 5, dtype=torch.complex64))
        self.shift = nn.Parameter(torch.randn(7, dtype=torch.complex64))
        self.phase = nn.Parameter(torch.randn((), dtype=torch.complex64))
        self.mix = nn.Linear(7, 6)

    def forward(self, x):
        return self.mix((x.to(torch.complex64) @ self.turn.T + self.shift).abs() * self.phase.abs())


def one_step(model, loss, section=SECTION, change=lambda: None):
    """(gradients of the loss, weights before, weights before minus after, plugin), by name."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    before = {name: real(p) for name, p in model.named_parameters()}
    plugin = spectral_ds.attach(model, optimizer, section)
    loss(model).backward()
    change()
    gradients = {n: p.grad.to_dense() for n, p in model.named_parameters() if p.grad is not None}
    gradients = {name: real(gradient) for name, gradient in gradients.items()}
    optimizer.step()
    moved = {n: (before[n] - real(p)) / RATE for n, p in model.named_parameters()}
    return gradients, before, moved, plugin


def complex_loss(model):
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    return model(x).square().mean()


def test_complex_parameters_are_filtered_with_both_parts_as_columns_of_a_node():
    gradients, before, moved, plugin = one_step(Complex(), complex_loss)
    assert_close(moved, filtered(before, gradients))
    assert np.abs(gradients["turn"][:, 1::2]).max() > 0  # imaginary parts
    whole = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    assert plugin.metrics()["gradient_norm/all"] == pytest.approx(whole, rel=1e-5)
    state = plugin.state_dict()
    plugin.load_state_dict(state)


def test_complex_updates_and_the_regularizer_act_on_both_parts():
    changes = {"filter": {**FILTER, "apply_to": "update"}, "regularizer": {"strength": 0.1}}
    changes["regularizer"] |= {"ridge": 0.5, "coupling": "decoupled", "reference": "zero"}
    gradients, before, moved, _ = one_step(Complex(), complex_loss, {**SECTION, **changes})
    laplacian = oracle.laplacian_of(oracle.adjacency_of(before, EDGES))
    steps = filtered(before, gradients)
    after = {name: before[name] - RATE * steps[name] for name in before}
    pull = oracle.apply_function(laplacian, lambda value: value + 0.5, after)
    assert_close(moved, {name: steps[name] + 0.1 * pull[name] for name in before})


@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_parameters_in_float64_are_filtered(apply_to):
    """The filter's own arithmetic is float32; the weights stay what they are."""
    filter_keys = {**FILTER, "apply_to": apply_to, "rescale": "norm", "temporal": {"decay": 0.5}}
    section = {**SECTION, "filter": filter_keys, "statistics": {"interval": 1}}
    model = Complex().mix.double()
    x = torch.randn(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients, before, moved, plugin = one_step(model, lambda m: m(x).square().sum(), section)
    smooth = filtered(before, gradients)
    kept = {n: v * np.linalg.norm(gradients[n]) / np.linalg.norm(v) for n, v in smooth.items()}
    amplify = 1 + plugin.config.filter.temporal.amplify
    assert_close(moved, {n: amplify * v for n, v in kept.items()})
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
    norm = np.sqrt(sum((value**2).sum() for value in gradients.values()))
    np.testing.assert_allclose(plugin.metrics()["gradient_norm/all"], norm, rtol=1e-5)


def test_gradients_that_autograd_goes_on_from_are_filtered():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5))
    plugin = spectral_ds.attach(model, torch.optim.SGD(model.parameters(), lr=RATE), SECTION)
    parameters = dict(model.named_parameters())
    loss = model(torch.randn(3, 5)).square().mean()
    gradients = torch.autograd.grad(loss, [*parameters.values()], create_graph=True)
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        assert gradient.requires_grad
        parameter.grad = gradient
    wanted = filtered(
        {n: real(p) for n, p in parameters.items()},
        {n: real(p.grad) for n, p in parameters.items()},
    )
    plugin.filter_gradients()
    assert_close({n: real(p.grad) for n, p in parameters.items()}, wanted)


def test_a_lazily_conjugated_gradient_counts_with_its_true_sign():
    model = Complex()

    def conjugate():
        model.turn.grad = model.turn.grad.conj()
        assert model.turn.grad.is_conj()

    gradients, before, moved, _ = one_step(model, complex_loss, change=conjugate)
    assert_close(moved, filtered(before, gradients))


def test_engines_that_keep_real_numbers_refuse_complex_parameters_by_name():
    parameters = dict(Complex().named_parameters())
    with pytest.raises(UnsupportedEngineError, match="'turn' is complex, and DeepSpeed keeps"):
        refuse_complex(parameters, "DeepSpeed")
    del parameters["turn"], parameters["shift"], parameters["phase"]
    refuse_complex(parameters, "DeepSpeed")


# Sparse gradients


class Sparse(nn.Module):
    """Words whose gradients are sparse, by a module or by a function of its own."""

    def __init__(self, kind="embedding"):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        make = nn.EmbeddingBag if kind == "bag" else nn.Embedding
        self.words = make(11, 6, sparse=kind != "function")
        self.mix = nn.Linear(6, 6)

    def forward(self, tokens):
        if self.kind == "function":
            found = nn.functional.embedding(tokens, self.words.weight, sparse=True)
        else:
            found = self.words(tokens)
        return self.mix(found)


def sparse_loss(model):
    return model(torch.tensor([[1, 2, 3], [3, 3, 7]])).square().sum()


@pytest.mark.parametrize("kind", ["embedding", "bag", "function"])
@pytest.mark.parametrize("changes", [{}, {"temporal": {"decay": 0.5}}, {"apply_to": "update"}])
def test_excluded_parameters_with_sparse_gradients_are_left_alone(kind, changes):
    model = Sparse(kind)
    section = {"graph": {"edges": EDGES}, "filter": {**FILTER, **changes}}
    section |= {"monitor": {"interval": 1}, "statistics": {"interval": 1}}
    gradients, before, moved, plugin = one_step(model, sparse_loss, section)
    assert_close(moved, {"words.weight": gradients["words.weight"]})
    if "temporal" not in changes:
        mixing = {n: v for n, v in before.items() if n.startswith("mix")}
        assert_close(moved, filtered(mixing, {n: gradients[n] for n in mixing}))
    assert plugin.metrics()["gradient_norm/all"] > 0
    norm = np.linalg.norm(before["words.weight"])
    assert plugin.metrics()["parameter_norm_by_role/words.weight"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("kind", ["embedding", "bag"])
def test_included_parameters_with_sparse_gradients_are_refused_at_attach(kind):
    model = Sparse(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    message = r"spectral_ds.graph: the gradient of parameter 'words.weight' is sparse.*exclude"
    with pytest.raises(SpectralConfigError, match=message):
        spectral_ds.attach(model, optimizer, SECTION)


def test_a_sparse_gradient_that_no_module_tells_of_is_refused_at_the_first_step():
    model = Sparse("function")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(SpectralConfigError, match=r"parameter 'words\.weight' is sparse"):
        one_step(model, sparse_loss)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


# Strides


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3)
        self.mix = nn.Linear(6, 6)
        self.last = nn.Linear(6, 1)
        self.first = nn.Parameter(torch.randn(3, 1))

    def forward(self, x):
        x = x * self.first[:, :, None]
        return self.last(self.mix(self.conv(x).mean((2, 3))))


def plain_loss(model):
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    return model(x).square().sum()


def apart(values):
    """The same values two elements apart."""
    wide = torch.zeros(values.numel(), 2)
    wide[:, 0] = values.reshape(-1)
    return torch.as_strided(wide, values.shape, [2 * step for step in values.stride()])


STRIDES = {
    "channels last": ("conv.weight", lambda g: g.to(memory_format=torch.channels_last)),
    "transposed": ("mix.weight", lambda g: g.T.contiguous().T),
    "every second element of a vector": ("mix.bias", apart),
    "every second element of a matrix": ("mix.weight", apart),
    # It has a flat view, of stride 2: not to be read as if its elements lay side by side.
    "every second element of a column": ("first", apart),
    "one value for all": ("mix.bias", lambda g: g[:1].expand(len(g))),
}


@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_gradients_of_other_strides_than_their_parameter_are_filtered_right(kind, apply_to):
    model = Plain()
    name, restride = STRIDES[kind]
    parameter = model.get_parameter(name)

    def change():
        parameter.grad = restride(parameter.grad)
        assert parameter.grad.stride() != parameter.stride()

    section = {**SECTION, "filter": {**FILTER, "apply_to": apply_to}}
    gradients, before, moved, plugin = one_step(model, plain_loss, section, change)
    assert_close(moved, filtered(before, gradients))
    whole = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    assert plugin.metrics()["gradient_norm/all"] == pytest.approx(whole, rel=1e-5)


def test_a_plain_gradient_is_not_copied():
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    plugin = spectral_ds.attach(model, optimizer, SECTION)
    plain_loss(model).backward()
    views = plugin.engine.gradients()
    for view, parameter in zip(views, model.parameters(), strict=True):
        assert view.data_ptr() == parameter.grad.data_ptr()


@pytest.mark.parametrize("kind", ["channels last", "every second element of a vector"])
def test_parameters_without_a_flat_view_are_refused_by_name(kind):
    model = Plain()
    name, restride = STRIDES[kind]
    parameter = model.get_parameter(name)
    parameter.data = restride(parameter.data)
    with pytest.raises(UnsupportedEngineError, match=f"parameter '{name}' is not contiguous"):
        spectral_ds.attach(model, torch.optim.SGD(model.parameters(), lr=RATE), SECTION)


def test_a_parameter_that_loses_its_flat_view_is_refused_by_name_in_the_step():
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    spectral_ds.attach(model, optimizer, SECTION)
    name, restride = STRIDES["channels last"]
    parameter = model.get_parameter(name)
    parameter.data = restride(parameter.data)
    with pytest.raises(UnsupportedEngineError, match=f"parameter '{name}' is not contiguous"):
        optimizer.step()


# Parameters that join later


def unfreezing(name, loss):
    """The loss, from a parameter on that was frozen until now."""

    def of(model):
        model.get_parameter(name).requires_grad_(True)
        return loss(model)

    return of


def test_complex_parameters_that_join_are_filtered_with_both_parts():
    model = Complex()
    model.turn.requires_grad_(False)
    gradients, before, moved, plugin = one_step(model, unfreezing("turn", complex_loss))
    assert plugin.engine.shapes["turn"] == (7, 10)
    assert_close(moved, filtered(before, gradients))


@pytest.mark.parametrize("exclude", [[], None])
def test_sparse_embeddings_that_join_are_known_by_their_module(exclude, caplog):
    model = Sparse()
    model.words.weight.requires_grad_(False)
    graph = {"edges": EDGES} if exclude is None else {"edges": EDGES, "exclude": exclude}
    loss = unfreezing("words.weight", sparse_loss)
    caplog.set_level("INFO", "spectral_ds")
    gradients, before, moved, plugin = one_step(model, loss, {**SECTION, "graph": graph})
    assert_close(moved, {"words.weight": gradients["words.weight"]})
    mixing = {name: value for name, value in before.items() if name.startswith("mix")}
    assert_close(moved, filtered(mixing, {name: gradients[name] for name in mixing}))
    joins = "words.weight" in plugin.engine.shapes
    assert joins == (exclude is None)
    wanted = "excluded by the configuration: words.weight" if joins else "'words.weight' is sparse"
    assert any(wanted in record.getMessage() for record in caplog.records)


def without_flat_view():
    """Three layers, of which the second has no flat view."""
    model = nn.Sequential(*(nn.Conv2d(2, 2, 2) for _ in range(3)))
    model[1].to(memory_format=torch.channels_last)
    model[1:].requires_grad_(False)
    return model


def by_torch(model):
    return TorchEngine(model, torch.optim.SGD(model.parameters(), lr=1.0))


def by_deepspeed(model):
    """An engine of ZeRO 0 around no more than it looks at."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = SimpleNamespace(
        module=model,
        optimizer=optimizer,
        basic_optimizer=optimizer,
        device="cpu",
        seq_data_parallel_group=None,
        monitor=SimpleNamespace(enabled=False),
    )
    return DeepSpeedReplicatedEngine(engine)


@pytest.mark.parametrize("engine_of", [by_torch, by_deepspeed])
def test_what_has_no_flat_view_is_named_and_stays_out_when_others_join(engine_of):
    model = without_flat_view()
    engine = engine_of(model)
    model[1].weight.requires_grad_(True)
    admission = engine.admit(engine.newcomers())
    assert (admission.joined, list(admission.left_out)) == ([], ["1.weight"])
    assert "contiguous" in admission.left_out["1.weight"]
    model[2].requires_grad_(True)
    admission = engine.admit(engine.newcomers())
    assert (admission.joined, admission.left_out) == (["2.weight", "2.bias"], {})
    assert list(engine.shapes) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(engine.named) == [name for name, _ in model.named_parameters()]
    assert [fragment.parameter for fragment in engine.fragments] == list(engine.shapes)
    admission.undo()
    assert list(engine.shapes) == ["0.weight", "0.bias"]
    if engine_of is by_deepspeed:
        model[0].extra = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        engine.optimizer.add_param_group({"params": [model[0].extra]})
        assert "is complex" in engine.admit(engine.newcomers()).left_out["0.extra"]


# DeepSpeed


def steps_of_deepspeed():
    """By ZeRO-0: (gradients, before, moved) with odd strides and a sparse gradient; refusals."""
    import deepspeed

    def engine_of(model, section, stage=0):
        config = tiny.deepspeed_config(stage, **({"spectral_ds": section} if section else {}))
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        start = spectral_ds.initialize if section else deepspeed.initialize
        return start(model=model, optimizer=optimizer, config=config)[0]

    found = {}
    for name, model, loss in (("strides", Plain(), plain_loss), ("sparse", Sparse(), sparse_loss)):
        before = {n: real(p) for n, p in model.named_parameters()}
        section = SECTION if name == "strides" else {**SECTION, "graph": {"edges": EDGES}}
        engine = engine_of(model, section)
        engine.backward(loss(model))
        if name == "strides":
            for parameter, restride in (("first", apart), ("mix.weight", STRIDES["transposed"][1])):
                model.get_parameter(parameter).grad = restride(model.get_parameter(parameter).grad)
        gradients = {n: real(p.grad.to_dense()) for n, p in model.named_parameters()}
        engine.step()
        moved = {n: (before[n] - real(p)) / RATE for n, p in model.named_parameters()}
        found[name] = gradients, before, moved
    refused = []
    for model in (Complex(), Sparse(), Plain()):
        if isinstance(model, Complex):
            model.phase = None  # DeepSpeed itself cannot broadcast it
        engine = engine_of(model, None)
        if isinstance(model, Plain):
            model.conv.to(memory_format=torch.channels_last)
        try:
            spectral_ds.attach(engine, config=SECTION)
        except (SpectralConfigError, UnsupportedEngineError) as error:
            refused.append(str(error))
    return found, refused


def test_zero_0_filters_odd_strides_leaves_sparse_alone_and_refuses_by_name(ranks):
    found, refused = ranks(1).run(steps_of_deepspeed)[0]
    gradients, before, moved = found["strides"]
    assert_close(moved, filtered(before, gradients))
    gradients, before, moved = found["sparse"]
    assert_close(moved, {"words.weight": gradients["words.weight"]})
    mixing = {name: value for name, value in before.items() if name.startswith("mix")}
    assert_close(moved, filtered(mixing, {name: gradients[name] for name in mixing}))
    is_complex, is_sparse, is_odd = refused
    assert "parameter 'turn' is complex, and DeepSpeed keeps" in is_complex
    assert "gradient of parameter 'words.weight' is sparse" in is_sparse
    assert "parameter 'conv.weight' is not contiguous" in is_odd
