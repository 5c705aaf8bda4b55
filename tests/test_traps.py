"""What engines do in special cases, and that the plugin minds it: stale gradients, overflow,
replicas, compiled, checkpointed and adapted models, refused features."""

import functools

import cells
import numpy as np
import peft
import pytest
import tiny
import torch
import torch.distributed as dist
from cells import CELLS, Training
from test_oracle import METHODS, expected_update, relative_error
from transformers import LlamaForCausalLM

import spectral_ds

SECTION = METHODS["depth-and-similarity-polynomial"]


class Shortened(tiny.TinyLlama):
    """A step may leave out the last block."""

    def forward(self, tokens, blocks=3):
        self.llama.config.num_hidden_layers = blocks
        return self.llama(input_ids=tokens, labels=tokens).loss


def step_that_leaves_out_a_block(name, section):
    """A whole step, then attach, then a step without the last block."""
    training = Training(CELLS[name], None, model=Shortened)
    training.step(0)
    if section is not None:
        training.attach(section)
    before = training.snapshot()
    training.step(1, blocks=2)
    after = training.snapshot()
    rates = cells.rates_by_name(training.module)
    training.close()
    return {
        "weights": before,
        "gradients": {n: (before[n] - after[n]) / rate for n, rate in rates.items()},
    }


@pytest.mark.parametrize(
    "name",
    ["zero1", "zero2", "zero2-offload", "zero3", "zero3-offload", "zero0", "fsdp2", "ddp"],
)
def test_gradients_of_unused_parameters_are_neither_filtered_nor_spread(ranks, name):
    plain = ranks(2).run(step_that_leaves_out_a_block, name, None)[0]
    result = ranks(2).run(step_that_leaves_out_a_block, name, SECTION)[0]
    unused = [n for n in plain["gradients"] if ".layers.2." in n or n.startswith("spare")]
    current = {n: np.zeros_like(g) if n in unused else g for n, g in plain["gradients"].items()}
    _, _, expected = expected_update(SECTION, {**plain, "gradients": current})
    if name != "zero0":
        # ZeRO-0 gives an unused parameter zeros, filtered like any other; elsewhere it has none,
        # and what the engine does with it (ZeRO-3 and offload step it again) stays as it is.
        expected = {**expected, **{n: plain["gradients"][n] for n in unused}}
    assert relative_error(result["gradients"], expected) <= 1e-5


@pytest.mark.parametrize("name", ["plain", "zero2-offload", "zero3", "fsdp2"])
def test_filtering_updates_leaves_unused_parameters_alone(ranks, name):
    size = CELLS[name].world_sizes[0] if name == "plain" else 2
    section = {**SECTION, "filter": {**SECTION["filter"], "apply_to": "update"}}
    plain = ranks(size).run(step_that_leaves_out_a_block, name, None)[0]["gradients"]
    found = ranks(size).run(step_that_leaves_out_a_block, name, section)[0]["gradients"]
    changed = {n for n, g in plain.items() if np.abs(found[n] - g).max() > 1e-3 * np.abs(g).max()}
    assert any(".layers.1." in n for n in changed)
    assert not any(".layers.2." in n or n.startswith("spare") for n in changed)


def overflowing_run(name):
    """Steps 0 and 2 are sound, step 1 overflows on one rank."""
    training = Training(CELLS[name], {**SECTION, "monitor": {"interval": 1}})
    training.step(0)
    before = training.snapshot()
    engine = training.engine
    [tokens] = tiny.batches(1, 1)
    loss = engine(tokens)
    engine.backward(loss * (torch.inf if dist.get_rank() == 1 else 1))
    engine.step()
    unchanged = all(np.array_equal(v, before[n]) for n, v in training.snapshot().items())
    skipped = engine.skipped_steps
    training.step(2)
    moved = training.snapshot()
    finite = all(np.isfinite(v).all() for v in moved.values())
    changed = any(not np.array_equal(v, before[n]) for n, v in moved.items())
    metrics = training.plugin.metrics()
    training.close()
    return unchanged, skipped, finite, changed, metrics


@pytest.mark.parametrize("name", ["zero1-fp16", "zero2-fp16", "zero3-fp16"])
def test_an_overflow_on_one_rank_skips_the_step_on_all_and_leaves_no_trace(ranks, name):
    for unchanged, skipped, finite, changed, metrics in ranks(2).run(overflowing_run, name):
        assert (unchanged, skipped, finite, changed) == (True, 1, True, True)
        assert metrics["skipped_steps"] == 1
        assert np.isfinite(list(metrics.values())).all()


MEANS = {
    **SECTION,
    "filter": {**SECTION["filter"], "temporal": {"decay": 0.5, "amplify": 0.5}},
    "statistics": {"interval": 1},
}


def overflow_of_what_is_not_filtered(name):
    """Skipped steps, and means over steps, after a sound step, one that overflows, a sound one."""
    training = Training(CELLS[name], MEANS)
    plugin = training.plugin
    statistics, temporal = plugin.stack.graphs[0].samples.statistics, plugin.stack.filter.temporal
    embedding = training.module.llama.model.embed_tokens.weight
    assert not any("embed" in p.name for p in plugin.graph.parameters)
    found = []
    for index in range(3):
        factor = torch.inf if index == 1 and dist.get_rank() == 1 else 1
        hook = embedding.register_hook(lambda gradient, factor=factor: gradient * factor)
        training.step(index)
        hook.remove()
        means = [statistics.running.mean, statistics.power, *temporal.means]
        found.append((training.engine.skipped_steps, torch.cat([m.flatten() for m in means])))
    training.close()
    return found


@pytest.mark.parametrize("name", ["zero2-fp16", "zero3-fp16", "zero2-fp16-offload"])
def test_an_overflow_of_parameters_that_are_not_filtered_reaches_no_mean(ranks, name):
    for (before, first), (skipped, same), (after, other) in ranks(2).run(
        overflow_of_what_is_not_filtered, name
    ):
        assert (before, skipped, after) == (0, 1, 1)
        assert first.isfinite().all()
        assert torch.equal(same, first)
        assert not torch.equal(other, first)


def step_with_infinite_gradient(name):
    """What is logged when a gradient of a torch engine, which skips no step, is not finite."""
    import logging

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append((record.levelname, record.getMessage()))
    logger = logging.getLogger("spectral_ds")
    logger.addHandler(handler)
    try:
        training = Training(CELLS[name], {**SECTION, "monitor": {"interval": 1}})
        for _ in range(2):
            training.wrapped(tiny.batches(1)[0]).mul(torch.inf).backward()
            training.optimizer.step()
            training.optimizer.zero_grad()
        training.close()
    finally:
        logger.removeHandler(handler)
    return messages


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_gradient_that_is_not_finite_is_counted_in_a_warning_of_rank_0(ranks, name):
    first, second = ranks(2).run(step_with_infinite_gradient, name)
    warnings = [message for level, message in first if level == "WARNING"]
    assert [str(count) in m for count, m in enumerate(warnings, start=1)] == [True, True]
    assert not second


@pytest.mark.parametrize("name", ["zero0", "zero1-bf16-fp32-accumulation", "ddp", "hsdp"])
def test_replicas_stay_bitwise_equal(ranks, name):
    first, *others = ranks(2).run(cells.one_step, name, SECTION)
    for other in others:
        for parameter in first["after"]:
            np.testing.assert_array_equal(other["after"][parameter], first["after"][parameter])


def test_the_norm_of_the_replicated_bf16_optimizer_is_that_of_the_filtered_gradient(ranks):
    name = "zero1-bf16-fp32-accumulation"
    plain = ranks(2).run(cells.one_step, name, None)[0]
    _, _, expected = expected_update(SECTION, plain)
    norm = np.sqrt(sum((g**2).sum() for g in expected.values()))
    unfiltered_norm = np.sqrt(sum((g**2).sum() for g in plain["gradients"].values()))
    assert unfiltered_norm > 1.05 * norm
    expected = {n: g / 3 for n, g in expected.items()}
    result = ranks(2).run(cells.one_step, name, SECTION, 1, float(norm) / 3)[0]
    assert relative_error(result["gradients"], expected) <= 2e-2


class Checkpointed(tiny.TinyLlama):
    """Recomputes activations in the backward pass."""

    def __init__(self, use_reentrant=False):
        super().__init__()
        self.llama.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        self.llama.train()


def step_of_model(name, section, model):
    training = Training(CELLS[name], section, model=model)
    training.step()
    after = training.snapshot()
    training.close()
    return after


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2", "ddp"])
def test_activation_checkpointing_changes_nothing(ranks, name):
    usual = ranks(2).run(step_of_model, name, SECTION, tiny.TinyLlama)[0]
    recomputed = ranks(2).run(step_of_model, name, SECTION, Checkpointed)[0]
    for parameter, value in usual.items():
        np.testing.assert_allclose(recomputed[parameter], value, atol=1e-5)


def plain_step(optimizer, filtered=None, wrap=lambda module: module):
    """One step of a torch optimizer; with `filtered`, of these gradients and no plugin."""
    module = tiny.TinyLlama()
    wrapped = wrap(module)
    groups = tiny.parameter_groups(module, (1e-2, 1e-3))
    stepper = optimizer(groups)
    if filtered is None:
        plugin = spectral_ds.attach(wrapped, stepper, SECTION)
    before = {n: p.detach().numpy().copy() for n, p in module.named_parameters()}
    wrapped(tiny.batches(1)[0]).backward()
    gradients = {
        n: p.grad.numpy().copy() for n, p in module.named_parameters() if p.grad is not None
    }
    if filtered is not None:
        for name, parameter in module.named_parameters():
            if name in filtered:
                parameter.grad = torch.from_numpy(filtered[name]).to(parameter.dtype)
    stepper.step()
    if filtered is None:
        names = [p.name for p in plugin.graph.parameters]
        plugin.detach()
    else:
        names = []
    after = {
        n.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""): p.detach().numpy()
        for n, p in module.named_parameters()
    }
    return {"weights": before, "gradients": gradients, "after": after, "names": names}


def expected_gradients(plain):
    """What the oracle makes of the gradients of one process; unused parameters have none."""
    trainable = [n for n, p in tiny.TinyLlama().named_parameters() if p.requires_grad]
    zeros = {n: np.zeros_like(plain["weights"][n]) for n in trainable}
    _, _, expected = expected_update(
        SECTION, {**plain, "gradients": {**zeros, **plain["gradients"]}}
    )
    return {n: expected[n] for n in plain["gradients"]}


OPTIMIZERS = {
    "AdamW": functools.partial(torch.optim.AdamW, foreach=True),
    "AdamW-fused": functools.partial(torch.optim.AdamW, fused=True),
    "SGD-momentum": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "Adafactor": torch.optim.Adafactor,
}


def optimizer_case(name):
    result = plain_step(OPTIMIZERS[name])
    reference = plain_step(OPTIMIZERS[name], expected_gradients(result))
    return result["after"], reference["after"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_on_the_filtered_gradient(ranks, name):
    got, expected = ranks(1).run(optimizer_case, name)[0]
    for parameter, value in expected.items():
        np.testing.assert_allclose(got[parameter], value, atol=2e-5)


def compile_eagerly(module):
    return torch.compile(module, backend="eager")


def wrap_in_checkpoints(module):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = module.llama.model.layers
    for index in range(len(layers)):
        layers[index] = checkpoint_wrapper(layers[index])
    return module


def wrapped_case(wrap):
    usual = plain_step(OPTIMIZERS["SGD-momentum"])
    wrapped = plain_step(OPTIMIZERS["SGD-momentum"], wrap=wrap)
    return usual, wrapped


def compile_ddp(module):
    wrapped = torch.nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
    return torch.compile(wrapped, backend="eager")


@pytest.mark.parametrize("wrap", [compile_eagerly, compile_ddp, wrap_in_checkpoints])
def test_compiled_and_wrapped_models_keep_their_names_and_results(ranks, wrap):
    usual, wrapped = ranks(1).run(wrapped_case, wrap)[0]
    assert wrapped["names"] == usual["names"]
    for parameter, value in usual["after"].items():
        np.testing.assert_allclose(wrapped["after"][parameter], value, atol=1e-6)


def compiled_step(name):
    training = Training(CELLS[name], SECTION)
    if training.cell.engine == "deepspeed":
        training.engine.compile(backend="eager")
    else:
        training.wrapped = torch.compile(training.wrapped, backend="eager")
    training.step()
    after = training.snapshot()
    training.close()
    return after


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_sharded_models_may_be_compiled(ranks, name):
    usual = ranks(2).run(step_of_model, name, SECTION, tiny.TinyLlama)[0]
    compiled = ranks(2).run(compiled_step, name)[0]
    for parameter, value in compiled.items():
        plain_name = parameter.replace("_orig_mod.", "")
        np.testing.assert_allclose(value, usual[plain_name], atol=1e-5)


class Adapted(torch.nn.Module):
    """LoRA adapters on a frozen model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        base = LlamaForCausalLM(tiny.llama_config())
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        self.adapted = peft.get_peft_model(base, settings)

    def forward(self, tokens):
        return self.adapted(input_ids=tokens, labels=tokens).loss


def adapted_step(name, section):
    training = Training(CELLS[name], section, model=Adapted)
    before = training.snapshot()
    training.step()
    after = training.snapshot()
    rates = cells.rates_by_name(training.module)
    training.close()
    return {
        "weights": before,
        "gradients": {n: (before[n] - after[n]) / rate for n, rate in rates.items()},
    }


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2", "ddp"])
def test_lora_adapters_are_filtered_and_frozen_weights_stay(ranks, name):
    plain = ranks(2).run(adapted_step, name, None)[0]
    assert all("lora" in n for n in plain["gradients"])
    result = ranks(2).run(adapted_step, name, SECTION)[0]
    _, laplacian, expected = expected_update(SECTION, plain)
    assert np.count_nonzero(np.triu(laplacian, 1)) > 0
    assert relative_error(result["gradients"], expected) <= 1e-5
    for parameter in plain["weights"]:
        if "lora" not in parameter:
            np.testing.assert_array_equal(result["weights"][parameter], plain["weights"][parameter])


def attach_by_hand_twice(name):
    """A loop that clips calls filter_gradients by hand; the hook must not filter again."""
    training = Training(CELLS[name], SECTION, clipping=1e9)
    training.step()
    by_hand = training.snapshot()
    training.close()
    training = Training(CELLS[name], SECTION)
    training.step()
    by_hook = training.snapshot()
    training.close()
    return by_hand, by_hook


@pytest.mark.parametrize("name", ["fsdp2", "ddp"])
def test_filtering_by_hand_replaces_the_hook(ranks, name):
    by_hand, by_hook = ranks(2).run(attach_by_hand_twice, name)[0]
    for parameter, value in by_hook.items():
        np.testing.assert_allclose(by_hand[parameter], value, atol=1e-6)
