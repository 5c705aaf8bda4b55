"""What enters the matrices of every kind of module, by dense numpy: no copy, no other vector."""

import copy
import logging

import numpy as np
import pytest
import tiny
import torch
import transformers
from activations import (
    RANK,
    RATE,
    CalledByIds,
    assert_operators,
    ids_of,
    inputs_of,
    keeping,
    operator_of,
    operators,
    random_ids,
    section_of,
)
from torch import nn

import spectral_ds
from spectral_ds.coactivation import sites_of, text_batches

# Matrices of two dimensions


def test_conv1d_of_gpt2_has_the_graph_of_its_inputs():
    model, kinds = tiny.gpt2(), (nn.Linear, transformers.pytorch_utils.Conv1D)
    ids = ids_of(model)
    plugin, _ = keeping(model, [{"input_ids": ids}])
    found = inputs_of(copy.deepcopy(model).double(), lambda m: m(input_ids=ids), kinds)
    del found["lm_head"]  # tied to the embedding, and left out like it
    assert_operators(plugin.graph, operators(found))


def test_a_step_of_gpt2_filters_the_dimension_of_the_inputs():
    model, kinds = tiny.gpt2(), (nn.Linear, transformers.pytorch_utils.Conv1D)
    ids = ids_of(model)
    plugin, optimizer = keeping(model, [{"input_ids": ids}])
    found = operators(inputs_of(copy.deepcopy(model).double(), lambda m: m(input_ids=ids), kinds))
    name = "transformer.h.1.mlp.c_fc.weight"
    weight = dict(model.named_parameters())[name]
    before = weight.detach().double().numpy().copy()
    model(input_ids=ids, labels=ids).loss.backward()
    gradient = weight.grad.double().numpy().copy()
    optimizer.step()
    identity = np.eye(len(gradient))  # stored as (inputs, outputs)
    function = 0.2 * identity + 0.8 * np.linalg.inv(identity + 1.5 * found[name, 0])
    moved = (before - weight.detach().double().numpy()) / RATE
    assert np.abs(moved - function @ gradient).max() <= 1e-5 * np.abs(gradient).max()
    plugin.detach()


CONVOLUTIONS = {
    "conv1d": (nn.Conv1d, {"stride": 2, "padding": 1, "dilation": 2}, (7,)),
    "conv1d same": (nn.Conv1d, {"padding": "same"}, (6,)),
    "conv2d": (nn.Conv2d, {"stride": (2, 1), "padding": (1, 0)}, (5, 4)),
    "conv2d circular": (nn.Conv2d, {"padding": 1, "padding_mode": "circular"}, (4, 5)),
}


def patches_of(conv, x):
    """(patches, channels × kernel), one after another, by hand."""
    mode = {"zeros": "constant", "circular": "wrap"}[conv.padding_mode]
    dimensions = len(conv.kernel_size)
    reach = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    if conv.padding == "same":
        pads = [(all_ // 2, all_ - all_ // 2) for all_ in reach]
    else:
        pads = [(pad, pad) for pad in conv.padding]
    x = np.pad(x.double().numpy(), [(0, 0), (0, 0), *pads], mode=mode)
    counts = [
        (size - extent - 1) // stride + 1
        for size, extent, stride in zip(x.shape[2:], reach, conv.stride, strict=True)
    ]
    found = []
    for image in x:
        for place in np.ndindex(*counts):
            patch = image
            for axis in range(dimensions):
                first = place[axis] * conv.stride[axis]
                index = first + conv.dilation[axis] * np.arange(conv.kernel_size[axis])
                patch = np.take(patch, index, axis + 1)
            found.append(patch.reshape(-1))
    return np.array(found)


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("is_batched", [True, False])
def test_a_convolution_multiplies_patches(case, is_batched):
    kind, options, shape = CONVOLUTIONS[case]
    torch.manual_seed(0)
    model = nn.Sequential(kind(3, 4, 3, **options))
    x = torch.randn(5, 3, *shape) if is_batched else torch.randn(3, *shape)
    plugin, _ = keeping(model, [x])
    patches = patches_of(model[0], x if is_batched else x[None])
    out = model(x).detach().numpy()
    kernel = model[0].weight.detach().double().numpy().reshape(4, -1)
    bias = model[0].bias.detach().double().numpy()
    by_hand = (patches @ kernel.T + bias).reshape(5 if is_batched else 1, -1, 4)
    np.testing.assert_allclose(np.moveaxis(by_hand, 2, 1).ravel(), out.ravel(), atol=1e-5)
    assert_operators(plugin.graph, {("0.weight", 0): operator_of(patches, RANK)})


def test_grouped_and_transposed_convolutions_count_as_without_inputs():
    model = nn.ModuleList(
        (nn.Conv1d(4, 4, 3, groups=2), nn.ConvTranspose1d(4, 4, 3), nn.Bilinear(4, 4, 4))
    )
    named = dict(model.named_parameters())
    shapes = {n: (1, len(p), p[0].numel()) for n, p in named.items() if p.dim() > 1}
    assert sites_of(model.modules(), named, shapes) == []


class HalfComplex(nn.Module):
    """Of two layers, one is complex."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.turn, self.mix = nn.Linear(5, 6, dtype=torch.complex64), nn.Linear(6, 3)

    def forward(self, x):
        return self.mix(self.turn(x.to(torch.complex64)).real)


def test_a_complex_layer_counts_as_without_inputs():
    model, x = HalfComplex(), torch.randn(20, 5)
    plugin, optimizer = keeping(model, [x])
    inputs = model.turn(x.to(torch.complex64)).real.detach().double().numpy()
    assert_operators(plugin.graph, operators({"mix": inputs}))
    before, weight = model.turn.weight.detach().clone(), model.turn.weight
    model(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(before - weight.detach(), weight.grad * RATE * (0.2 + 0.8 * 0.6))
    plugin.detach()


# Who shares a graph


class InPlace(nn.Module):
    """Two layers get one tensor, which changes in between; two others the same values."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        x = x.clone()
        total = self.layers[0](x)
        x.relu_()
        return total + self.layers[1](x) + self.layers[2](x) + self.layers[3](x.clone())


def test_layers_share_a_graph_if_they_get_one_tensor_that_has_not_changed():
    model, x = InPlace(), torch.randn(40, 6)
    plugin, _ = keeping(model, [x])
    leaders = {int(n.split(".")[1]): plugin.graph.keep.leaders[n].split(".")[1] for n in
               plugin.graph.keep.leaders}  # fmt: skip
    assert leaders == {0: "0", 1: "1", 2: "1", 3: "3"}
    first, second = operator_of(x.double().numpy(), 3), operator_of(x.relu().double().numpy(), 3)
    wanted = [first, second, second, second]
    assert_operators(plugin.graph, {(f"layers.{i}.weight", 0): wanted[i] for i in range(4)})


class CalledTwice(nn.Module):
    """Layers 0 and 1 get two tensors, layer 2 the first alone, as in DeBERTa; 3 and 4 are tied."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(5))
        self.layers[4].weight = self.layers[3].weight

    def forward(self, x):
        first, second, third, fourth, fifth = self.layers
        positions = x[:4].exp()
        attended = first(x) + second(x) + third(x)
        attended[:4] += second(positions) * first(positions)
        return fifth(fourth(attended).relu())


def test_a_graph_is_of_all_that_enters_and_shared_if_all_of_it_is():
    """Also where several modules hold one parameter."""
    model, calls = CalledTwice(), (torch.randn(9, 6), torch.randn(40, 6))
    found = inputs_of(copy.deepcopy(model).double(), lambda m: [m(x.double()) for x in calls])
    tied = found.pop("layers.4")
    found["layers.3"] = np.concatenate((found["layers.3"], tied))
    plugin, _ = keeping(model, calls)
    leaders = {n.split(".")[1]: of.split(".")[1] for n, of in plugin.graph.keep.leaders.items()}
    assert leaders == {"0": "0", "1": "0", "2": "2", "3": "3"}
    assert_operators(plugin.graph, operators(found))


def test_query_key_and_value_share_a_graph_and_so_do_gate_and_up():
    model = CalledByIds()
    plugin, _ = keeping(model, [{"input_ids": ids_of(model)}])
    leaders = plugin.graph.keep.leaders
    for block in range(3):
        layer = f"llama.model.layers.{block}"
        names = [f"{layer}.self_attn.{kind}_proj.weight" for kind in "qkv"]
        assert {leaders[name] for name in names} == {names[0]}
        assert leaders[f"{layer}.mlp.up_proj.weight"] == f"{layer}.mlp.gate_proj.weight"
    assert leaders["spare.weight"] == "spare.weight"  # nothing enters it
    assert len(set(leaders.values())) == 3 * 4  # and a down_proj is frozen


# Models in parts, wrapped, of low precision


def test_adapters_have_the_graph_of_the_layer_they_adapt():
    import peft

    base = transformers.LlamaForCausalLM(tiny.llama_config())
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    ids = ids_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    plugin, _ = keeping(model, [{"input_ids": ids}], parameters=trained)
    found = inputs_of(copy.deepcopy(model).double(), lambda m: m(input_ids=ids))
    assert_operators(
        plugin.graph, operators({name: x for name, x in found.items() if ".lora_" in name})
    )
    assert len(plugin.graph.keep.leaders) == 12
    plugin.detach()


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY_OF_T5, d_model=12, d_kv=3, d_ff=20, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


VOCABULARY_OF_T5 = 23


def test_an_encoder_decoder_is_called_with_the_ids_on_both_sides():
    model = t5()
    section = section_of({"rank": RANK, "samples": 6, "length": 5})
    plugin = spectral_ds.attach(model, torch.optim.SGD(model.parameters(), lr=1.0), section)
    ids = random_ids(6, 5, 0, VOCABULARY_OF_T5)
    found = inputs_of(
        copy.deepcopy(model).double(), lambda m: m(input_ids=ids, decoder_input_ids=ids)
    )
    del found["lm_head"]
    assert_operators(plugin.graph, operators(found))
    assert any("EncDecAttention.k" in name for name in found)


@pytest.mark.parametrize("is_masked", [False, True])
def test_in_a_decoder_its_own_mask_counts_and_of_the_encoded_the_other(is_masked):
    """Source and target of equal length."""
    model = t5()
    model.lm_head = nn.Linear(12, VOCABULARY_OF_T5)  # not tied to the embedding
    ids, own = random_ids(6, 5, 0, VOCABULARY_OF_T5), torch.ones(6, 5, dtype=torch.long)
    mask = own.clone()
    mask[1, 2:], mask[4, 1:], own[0, 3:] = 0, 0, 0
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    if is_masked:
        batch["decoder_attention_mask"] = own
    section = section_of({"keep": "given", "rank": RANK})
    section["graph"]["exclude"] = []
    plugin, _ = keeping(model, [batch], section)
    found = inputs_of(copy.deepcopy(model).double(), lambda m: m(**batch))
    for name, x in found.items():
        of_encoder = name.startswith("encoder") or name.endswith(
            ("EncDecAttention.k", "EncDecAttention.v")
        )
        if of_encoder or is_masked:
            found[name] = x[(mask if of_encoder else own).reshape(-1).bool().numpy()]
    assert ("lm_head.weight", 0) in plugin.graph.held.graph_of
    assert_operators(plugin.graph, operators(found))


def test_texts_are_masked_on_both_sides_of_an_encoder_decoder():
    model, seen = t5(), []

    def tokenizer(*_, **__):
        return {"input_ids": [[3, 4, 5, 6], [7, 8]]}

    tokenizer.bos_token_id = None
    [batch] = text_batches(model, ["", ""], tokenizer, 2, 4, 0)
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    batch(model)
    for name in ("attention_mask", "decoder_attention_mask"):
        assert seen[0][name].sum(1).tolist() == [2, 4]


def test_a_head_that_is_not_excluded_has_the_graph_of_all_tokens():
    """One that is the embedding too has none: what enters an embedding are numbers."""
    ids = random_ids(6, 5)
    for tied in (True, False):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(tiny.llama_config(tie_word_embeddings=tied))
        section = section_of({"rank": RANK, "samples": 6, "length": 5})
        section["graph"]["exclude"] = []
        plugin = spectral_ds.attach(model, torch.optim.SGD(model.parameters(), lr=1.0), section)
        found = operators(inputs_of(copy.deepcopy(model).double(), lambda m: m(input_ids=ids)))
        if tied:
            del found["lm_head.weight", 0]
        assert_operators(plugin.graph, found)
        plugin.detach()


@pytest.mark.parametrize("is_by_name", [True, False])
def test_padding_does_not_count(is_by_name):
    model = CalledByIds()
    ids = ids_of(model, 4, 6)
    mask = torch.ones_like(ids)
    mask[0, 4:], mask[2, 1:] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    plugin, _ = keeping(model, [batch if is_by_name else (ids, mask)])
    whole = inputs_of(copy.deepcopy(model).double(), lambda m: m(**batch))
    counted = {name: x[mask.reshape(-1).bool().numpy()] for name, x in whole.items()}
    frozen = "llama.model.layers.1.mlp.down_proj"
    expected = operators({n: x for n, x in counted.items() if "lm_head" not in n and n != frozen})
    assert_operators(plugin.graph, expected)
    name = "llama.model.layers.0.mlp.down_proj.weight"
    assert np.abs(expected[name, 0] - operator_of(whole[name[:-7]], RANK)).max() > 1e-2
    plugin.detach()


class Heads(nn.Module):
    """A layer that gets (batch, heads, tokens, inputs), as latents of DeepSeek-V3 are."""

    def __init__(self, heads):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.mix = heads, nn.Linear(5, 3)

    def forward(self, x, attention_mask):
        return self.mix(x.unflatten(2, (self.heads, 5)).transpose(1, 2))


@pytest.mark.parametrize("heads", [1, 2])
def test_padding_does_not_count_where_heads_are_in_front_of_tokens(heads):
    x, mask = torch.randn(4, 6, 5 * heads), torch.ones(4, 6, dtype=torch.long)
    mask[0, 4:], mask[2, :5] = 0, 0
    plugin, _ = keeping(Heads(heads), [{"x": x, "attention_mask": mask}])
    counted = x[mask.bool()].reshape(-1, 5).double().numpy()
    assert_operators(plugin.graph, operators({"mix": counted}))
    plugin.detach()


def test_a_model_in_bf16_has_the_same_graph_but_for_rounding():
    model = CalledByIds(torch.bfloat16)
    ids = ids_of(model, 20)
    plugin, _ = keeping(model, [{"input_ids": ids}])
    found = inputs_of(copy.deepcopy(model).double(), lambda m: m(input_ids=ids))
    for name, _ in plugin.graph.held.graph_of:
        wanted = operator_of(found[name[:-7]], RANK)
        assert np.abs(plugin.graph.operator(name) - wanted).max() <= 2e-2 * np.abs(wanted).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_sums_and_steps_are_not_rounded(dtype):
    """Activations of so different sizes that a sketch in 8 bits is positive no more."""
    torch.manual_seed(0)
    model = torch.nn.Linear(96, 8)
    x = torch.randn(200, 96) * torch.logspace(2, -2, 96)
    section = section_of({"keep": "given", "rank": 4})
    moved = []
    for is_cast in (False, True):
        tried = copy.deepcopy(model)
        optimizer = torch.optim.SGD(tried.parameters(), lr=1e-6)
        plugin = spectral_ds.attach(tried, optimizer, section)
        with torch.autocast("cpu", dtype, enabled=is_cast):
            plugin.calibrate([(x,)])
            tried.weight.grad = x[:8].clone()
            optimizer.step()
        assert_operators(plugin.graph, {("weight", 0): operator_of(x.double().numpy(), 4)})
        moved.append((tried.weight - model.weight).detach())
        plugin.detach()
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=1e-6 * float(moved[0].abs().max()))


def wrapped_in(how):
    model = CalledByIds()
    if how == "compiled":
        compiled = torch.compile(model, backend="eager")
        compiled(ids_of(model))
        return compiled
    model.llama.gradient_checkpointing_enable()
    return model.train()


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_compiled_and_checkpointed_models_have_the_same_graph(how):
    plain, model = CalledByIds(), wrapped_in(how)
    ids = ids_of(plain)
    wanted, by = keeping(plain, [{"input_ids": ids}])
    plugin, optimizer = keeping(model, [{"input_ids": ids}])
    expected = {key: wanted.graph.operator(*key) for key in wanted.graph.held.graph_of}
    assert_operators(plugin.graph, expected)
    for trained, step in ((plain, by), (model, optimizer)):
        trained(ids).backward()
        step.step()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)
    plugin.detach()
    wanted.detach()


# What is left as it was


class Watched(CalledByIds):
    """With dropout and running means, and some of it in evaluation."""

    def __init__(self):
        super().__init__()
        self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(3)
        self.spare.eval()
        self.llama.model.layers[1].eval()

    def forward(self, input_ids):
        self.norm(torch.rand(4, 3))
        return super().forward(input_ids) + self.dropout(torch.ones(3)).sum()


def state_of(model):
    """Whatever a call of the model may change."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called")
    return {
        "training": [module.training for module in model.modules()],
        "hooks": [len(getattr(module, kind)) for module in model.modules() for kind in hooks],
        "trained": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "weights": [p.detach().clone() for p in [*model.parameters(), *model.buffers()]],
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
        "caches": model.config.use_cache,
    }


def assert_same_state(before, after):
    assert before.keys() == after.keys()
    for key, values in before.items():
        if torch.is_tensor(values):
            assert torch.equal(values, after[key]), key
            continue
        if not isinstance(values, list):
            assert values == after[key], key
            continue
        for old, new in zip(values, after[key], strict=True):
            same = torch.equal(old, new) if torch.is_tensor(old) else old == new
            assert same, key


def test_calibration_leaves_everything_as_it_was():
    model = Watched()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    model(random_ids(3)).backward()
    before = state_of(model)
    section = section_of({"samples": 60}, filter={"apply_to": "gradient"})
    plugin = spectral_ds.attach(model, optimizer, section)
    assert_same_state(before, state_of(model))
    plugin.calibrate([{"input_ids": random_ids(3)}])
    assert_same_state(before, state_of(model))
    with pytest.raises(TypeError, match="no_such"):
        plugin.calibrate([{"no_such": random_ids(3)}])
    assert_same_state(before, state_of(model))
    plugin.detach()


def test_modules_that_nothing_enters_are_named_and_count_as_without_inputs(caplog):
    caplog.set_level(logging.WARNING, "spectral_ds")
    model = CalledByIds()
    plugin, optimizer = keeping(model, [{"input_ids": ids_of(model)}])
    [message] = [r.getMessage() for r in caplog.records if "activation" in r.getMessage()]
    assert "no finite activation has entered spare.weight" in message
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {n: (before[n] - p.detach()) / RATE for n, p in model.named_parameters()}
    alone = ["spare.weight", "spare.bias", "llama.model.layers.0.input_layernorm.weight"]
    for name in alone:  # 1 - s + s x rest
        torch.testing.assert_close(moved[name], torch.full_like(moved[name], 0.2 + 0.8 * 0.6))
    embedding = moved["llama.model.embed_tokens.weight"]  # excluded
    torch.testing.assert_close(embedding, torch.ones_like(embedding))
    plugin.detach()
