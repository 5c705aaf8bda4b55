"""Filters, regularizers and inputs of co-activation graphs in one process, against dense numpy."""

import copy

import activations
import numpy as np
import oracle
import pytest
import tiny
import torch
import transformers
from activations import (
    RATE,
    CalledByIds,
    Writer,
    assert_operators,
    expected_update,
    inputs_of,
    keeping,
    operator_of,
    random_ids,
    section_of,
    trained,
    words,
    write_texts,
)
from expected import relative_error
from plain_step import one_step

import spectral_ds
from spectral_ds.coactivation import generated_batches, operator, random_batches

NOTHING = np.zeros((0, 9), np.int64)


def step_by(section, model=None):
    """The facts of a step without a plugin that made it, what it changed, and the plugin."""
    model = CalledByIds() if model is None else model
    before, gradients, moved, plugin = one_step(model, section)
    names = trained(model)
    facts = {
        "weights": before,
        "gradients": {name: gradients[name] for name in names},
        "rates": dict.fromkeys(names, RATE),
    }
    plugin.detach()
    return facts, {name: moved[name] for name in names}, plugin


# Responses


RESPONSES = {
    "tikhonov": {"response": "tikhonov", "tau": 3.0},
    "heat": {"response": "heat", "tau": 0.7, "strength": 1.0, "rest": 1.0},
    "window": {"response": "window", "alpha": 0.3},
    "polynomial": {"response": "polynomial", "coefficients": [0.5, -0.2, 0.01]},
    "bands": {"response": "bands", "gains": [1.0, 0.2, 0.5], "order": 20},
    "of gradients": {"response": "tikhonov", "tau": 1.0, "apply_to": "gradient"},
}


@pytest.mark.parametrize("name", RESPONSES)
@pytest.mark.parametrize("rank", [2, 8, 64])
def test_a_filter_is_a_function_of_the_operator(name, rank):
    """Of 24 and 37 inputs, rank 2 knows none exactly, rank 8 those of 24, rank 64 all, in full."""
    section = section_of({"rank": rank}, filter=RESPONSES[name])
    section["filter"] = {k: v for k, v in section["filter"].items() if k in RESPONSES[name]} | {
        k: v for k, v in section["filter"].items() if k in ("strength", "rest", "apply_to")
    }
    plain, moved, _ = step_by(section)
    assert relative_error(moved, expected_update(section, plain)) <= 1e-5


def test_stacked_graphs_filter_one_after_another():
    section = section_of({"rank": 8}, filter={"strength": 1.0, "tolerance": 1e-7})
    both = {
        **section,
        "graphs": [{"node": "row", "edges": [{"family": "ring"}]}, section["graph"]],
    }
    del both["graph"]
    plain, moved, _ = step_by(both)
    weights = {n: plain["weights"][n] for n in plain["gradients"] if tiny.is_filtered(n)}
    laplacian = oracle.laplacian_of(oracle.adjacency_of(weights, [{"family": "ring"}]))
    rows = {n: plain["gradients"][n] for n in weights}
    plain["gradients"] |= oracle.apply_function(
        laplacian, oracle.response_of(section["filter"]), rows
    )
    assert relative_error(moved, expected_update(section, plain)) <= 1e-5


# The regularizer


PULL = {"strength": 0.01, "ridge": 0.3, "reference": "zero"}
IDLE = {"response": "identity", "apply_to": "gradient", "rest": 1.0}


@pytest.mark.parametrize("coupling", ["joint", "decoupled"])
@pytest.mark.parametrize("strength", [0.01, 1e6])
@pytest.mark.parametrize("response", ["laplacian", "tikhonov"])
def test_the_regularizer_pulls_by_activity(coupling, strength, response, said):
    """Joint: the gradient of the loss + αR. Decoupled: a step that is stable at any strength."""
    pull = {**PULL, "strength": strength, "coupling": coupling, "response": response}
    section = section_of({"rank": 8}, filter=IDLE, regularizer=pull, monitor={"interval": 1})
    del section["filter"]["tau"]
    if response == "tikhonov":
        section["filter"]["tau"] = 2.0
    plain, moved, plugin = step_by(section)
    operators = activations.operators_for(section, plain["weights"])
    expected, energy = {}, 0.0
    for name, gradient in plain["gradients"].items():
        if not tiny.is_filtered(name):
            expected[name] = gradient
            continue
        weight = plain["weights"][name]
        operator = operators.get(name, np.eye(weight.reshape(len(weight), -1).shape[-1]))
        if response == "tikhonov":
            operator = np.linalg.inv(np.eye(len(operator)) + 2 * operator)
        operator = operator + 0.3 * np.eye(len(operator))
        rows = weight.reshape(-1, len(operator))
        energy += np.sum(rows @ operator * rows) / 2
        if coupling == "joint":
            expected[name] = gradient + strength * (rows @ operator).reshape(weight.shape)
        else:
            after = (weight - RATE * gradient).reshape(rows.shape)
            after = after @ np.linalg.inv(np.eye(len(operator)) + RATE * strength * operator)
            expected[name] = (weight - after.reshape(weight.shape)) / RATE
            if strength > 1:  # nearly nothing is left
                left = np.abs(weight - RATE * moved[name]).max()
                assert left <= 1e-5 * np.abs(weight - RATE * gradient).max()
    assert relative_error(moved, expected) <= 1e-5
    np.testing.assert_allclose(plugin.metrics()["regularizer"], energy, rtol=1e-5)
    assert not [message for message in said() if "overshoot" in message]


class NormAside(torch.nn.Module):
    """A small matrix, and a norm of more elements, which has no inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(6, 2), torch.nn.LayerNorm(30)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coupling", ["joint", "decoupled"])
def test_weights_of_two_bytes_are_pulled_like_others(dtype, coupling, monkeypatch):
    """A norm has no inputs: it is pulled part by part, towards a reference in float32."""
    monkeypatch.setattr(operator, "FEWEST", 1)
    found = []
    for each in (torch.float32, dtype):
        torch.manual_seed(0)
        model = NormAside().to(each)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        pull = {**PULL, "strength": 2.0, "coupling": coupling, "reference": "pretrained"}
        section = section_of({"keep": "given"}, filter=IDLE, regularizer=pull)
        del section["filter"]["tau"]
        plugin = spectral_ds.attach(model, optimizer, section)
        plugin.calibrate([(torch.randn(20, 6).to(each),)])
        for step in (1.0, 0.5):
            for parameter in model.parameters():
                parameter.grad = torch.linspace(step, 1, parameter.numel(), dtype=each).view_as(
                    parameter
                )
            optimizer.step()
        parts = list(plugin.stack.graphs[0].held.operator.moved(torch.zeros(30), None))
        assert [len(moved) for _, moved in parts] == [12, 12, 6]
        assert len({moved.data_ptr() for _, moved in parts}) == 1, "memory is used again"
        found.append([p.detach().float() for p in model.parameters()])
        plugin.detach()
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0.02)


def test_a_response_that_lets_updates_grow_is_told(said):
    for alpha, is_told in ((0.01, False), (0.9, True)):
        window = {"response": "window", "alpha": alpha, "tau": 1.0}
        section = section_of({"rank": 8}, filter=window)
        del section["filter"]["tau"]
        step_by(section)
        assert any("never let them grow" in message for message in said()) == is_told


# Inputs to keep


def test_given_inputs_idle_before_and_act_after():
    pull = {**PULL, "coupling": "decoupled"}
    section = section_of({"keep": "given", "rank": 8}, regularizer=pull)
    model = CalledByIds()
    plain, moved, plugin = step_by(section, model)
    assert relative_error(moved, plain["gradients"]) <= 1e-6
    assert "until calibrate()" in plugin.describe()
    model, ids = CalledByIds(), random_ids(20, seed=3)
    section["regularizer"] = {**pull, "reference": "pretrained"}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    plugin = spectral_ds.attach(model, optimizer, section)
    with pytest.raises(ValueError, match="nothing is known yet"):
        plugin.save_activations("nowhere.safetensors")
    plugin.calibrate([{"input_ids": ids[:12]}, (ids[12:19],), ids[19:]])
    before, gradients, moved = by_hand(model, optimizer)
    plain = {"weights": before, "gradients": gradients, "rates": dict.fromkeys(gradients, RATE)}
    assert relative_error(moved, expected_update(section, plain, kept=ids)) <= 1e-5
    plugin.detach()


def by_hand(model, optimizer):
    """Weights, made-up gradients, and what a step makes of them."""
    names = trained(model)
    named = dict(model.named_parameters())
    before = {n: p.detach().double().numpy().copy() for n, p in named.items()}
    generator = torch.Generator().manual_seed(4)
    for name in names:
        named[name].grad = torch.randn(named[name].shape, generator=generator)
    optimizer.step()
    gradients = {n: named[n].grad.double().numpy().copy() for n in names}
    optimizer.zero_grad()
    return before, gradients, {n: (before[n] - named[n].detach().double().numpy()) / RATE
                               for n in names}  # fmt: skip


def test_batches_that_cannot_be_used_are_an_error():
    model = CalledByIds()
    plugin, _ = keeping(model, [random_ids(2)])
    known = plugin.graph.keep
    with pytest.raises(ValueError, match="batches: there is none"):
        plugin.calibrate([])
    assert plugin.graph.keep is known
    plugin.detach()
    other = spectral_ds.attach(model, torch.optim.SGD(model.parameters(), lr=1.0), {})
    with pytest.raises(ValueError, match="no graph of the configuration is of family activations"):
        other.calibrate([random_ids(2)])
    other.detach()


def test_texts_are_kept_and_learned_through_a_tokenizer(tmp_path):
    keep, learn = tmp_path / "keep.txt", tmp_path / "learn.txt"
    kept, learned = write_texts(keep), write_texts(learn, seed=8)
    edge = {"rank": 8, "keep": str(keep), "learn": str(learn), "tokenizer": words(tmp_path)}
    for response in ("tikhonov", "heat"):
        section = section_of(edge, filter={"response": response})
        plain, moved, _ = step_by(section)
        expected = expected_update(section, plain, learned=learned, kept=kept)
        assert relative_error(moved, expected) <= 1e-5


def test_the_tokenizer_of_the_model_is_used_if_none_is_named(tmp_path):
    kept = write_texts(tmp_path / "keep.txt")
    model = CalledByIds()
    model.config._name_or_path = words(tmp_path)
    section = section_of({"rank": 8, "keep": str(tmp_path / "keep.txt")})
    plain, moved, _ = step_by(section, model)
    assert relative_error(moved, expected_update(section, plain, kept=kept)) <= 1e-5


def test_of_many_texts_as_many_pieces_are_looked_at_as_samples_says(tmp_path):
    write_texts(tmp_path / "keep.txt")
    edge = {"keep": str(tmp_path / "keep.txt"), "tokenizer": words(tmp_path), "samples": 3}
    model, seen = CalledByIds(), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    spectral_ds.attach(model, torch.optim.SGD(model.parameters(), lr=1.0), section_of(edge))
    assert sum(len(ids) for ids in seen) == 3


def test_generated_text_counts_each_token_once():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(tiny.llama_config())
    section = section_of({"rank": 8, "keep": "generated", "samples": 70}, seed=3)
    random_state = torch.get_rng_state()
    plugin = spectral_ds.attach(model, torch.optim.SGD(model.parameters(), lr=1.0), section)
    assert torch.equal(torch.get_rng_state(), random_state)
    texts = []
    for first, count in ((0, 64), (64, 6)):
        torch.manual_seed(3 + first)
        texts.append(
            model.generate(
                torch.ones(count, 1, dtype=torch.long),  # the begin token
                attention_mask=torch.ones(count, 1, dtype=torch.long),
                do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                min_new_tokens=9, max_new_tokens=9, pad_token_id=0,
            )
        )  # fmt: skip
    ids = torch.cat(texts)[:, :-1]  # the last is written, and not read
    assert len(ids.unique()) > 20
    found = inputs_of(copy.deepcopy(model).double(), lambda called: called(input_ids=ids))
    del found["lm_head"]
    assert_operators(
        plugin.graph, {(f"{n}.weight", 0): operator_of(x, 8, seed=3) for n, x in found.items()}
    )


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 10.0, "no_repeat_ngram_size": 1, "typical_p": 0.2},
        {"suppress_tokens": list(range(3, 30)), "epsilon_cutoff": 0.1},
        {"num_beams": 3, "num_return_sequences": 2, "max_time": 1e-9},
    ],
)
def test_text_is_sampled_whatever_the_model_has_for_generation(own):
    model = transformers.LlamaForCausalLM(tiny.llama_config()).eval()
    [batch] = generated_batches(model, samples=6, length=9, seed=3)
    plain = ids_of(batch, model)
    settings = model.generation_config
    for name, value in own.items():
        setattr(settings, name, value)
    assert torch.equal(ids_of(batch, model), plain)
    assert plain.shape == (6, 9)
    assert model.generation_config is settings
    assert own.items() <= settings.to_dict().items()


def ids_of(batch, model):
    """All that enters a model, token after token."""
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    batch(model)
    handle.remove()
    return torch.cat(seen, 1)


def test_a_model_that_takes_any_length_is_called_with_the_whole_length():
    config = transformers.XLNetConfig(vocab_size=32, d_model=16, n_layer=1, n_head=2, d_inner=24)
    assert config.max_position_embeddings == -1
    [batch] = random_batches(transformers.XLNetLMHeadModel(config), 3, length=9, seed=0)
    assert ids_of(batch, transformers.XLNetLMHeadModel(config)).shape == (3, 9)


# Statistics in a file


def test_statistics_of_one_run_serve_another(tmp_path):
    """Also of fewer parameters, whose leaders are not trained, and of a lower rank."""
    file = tmp_path / "folder" / "stats.safetensors"
    model, ids = CalledByIds(), random_ids(20, seed=3)
    first, _ = keeping(model, [ids], section_of({"keep": "given", "rank": 8}))
    first.save_activations(file)
    first.detach()
    section = section_of({"keep": str(file), "rank": 8})
    plain, moved, plugin = step_by(section)
    assert relative_error(moved, expected_update(section, plain, kept=ids)) <= 1e-5
    for name in first.graph.held.graph_of:
        np.testing.assert_array_equal(plugin.graph.operator(*name), first.graph.operator(*name))

    model = CalledByIds()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("k_proj" in name or "up_proj" in name)
    trained_now = [p for p in model.parameters() if p.requires_grad]
    section = section_of({"keep": str(file), "rank": 5})
    plugin = spectral_ds.attach(model, torch.optim.SGD(trained_now, lr=1.0), section)
    again = tmp_path / "state"
    for _ in range(2):
        for name in plugin.graph.keep.leaders:
            whole = first.graph.operator(name)
            values, vectors = np.linalg.eigh(whole)
            wanted = activations.truncated(values, vectors, 5)
            np.testing.assert_allclose(plugin.graph.operator(name), wanted, atol=1e-5)
        assert len(plugin.graph.keep.leaders) == 6
        plugin.save(again)
        plugin.load(again)
    plugin.detach()


class Wrapped(torch.nn.Module):
    """A model that others call, beside another one, as a LightningModule holds them."""

    def __init__(self):
        super().__init__()
        self.teacher = Writer().requires_grad_(False)
        self.model = Writer()

    def forward(self, batch):
        return self.model(**batch)


@pytest.mark.parametrize("keep", ["random", "generated"])
def test_a_model_in_another_module_is_called_itself(keep):
    section = section_of({"keep": keep, "learn": "training", "samples": 4})
    ids = random_ids(4)
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0  # is seen in the inner call alone
    graphs = []
    for model in (Writer(), Wrapped()):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        plugin = spectral_ds.attach(model, optimizer, section)
        batch = {"input_ids": ids, "attention_mask": mask}
        while plugin.graph.learn is None:
            (model(**batch) if isinstance(model, Writer) else model(batch)).backward()
            optimizer.step()
        graphs.append(plugin.graph)
        plugin.detach()
    bare, wrapped = graphs
    for known in ("keep", "learn"):
        one, two = getattr(bare, known), getattr(wrapped, known)
        assert {f"model.{name}" for name in one.leaders} == set(two.leaders)
        for name in one.leaders:
            for spectrum, same in zip(one.of(name), two.of(f"model.{name}"), strict=True):
                np.testing.assert_array_equal(same.values, spectrum.values)
                np.testing.assert_array_equal(same.vectors, spectrum.vectors)


def test_filtering_gradients_under_adam_is_warned_of(said):
    model = CalledByIds()
    acts, looks = {"response": "tikhonov"}, {"response": "identity"}
    for settings, count in (
        ({**acts, "apply_to": "gradient"}, 1),
        ({**acts, "apply_to": "update"}, 0),
        ({**looks, "apply_to": "gradient"}, 0),
        ({**looks, "apply_to": "gradient", "rest": 0.5}, 1),
    ):
        section = section_of() | {"filter": settings}
        already = len([m for m in said() if "2604.22407" in m])
        plugin = spectral_ds.attach(model, torch.optim.AdamW(model.parameters()), section)
        assert len([m for m in said() if "2604.22407" in m]) - already == count
        plugin.detach()
