"""What engines do in special cases, and that the plugin minds it: stale gradients, overflow,
replicas, compiled, checkpointed and adapted models, refused features."""

import functools

import numpy as np
import peft
import pytest
import tiny
import torch
import torch.distributed as dist
from cells import ThereAndBack, Training, steps_from_here
from deepspeed.accelerator import get_accelerator
from expected import METHODS, expected_update, relative_error
from transformers import LlamaForCausalLM

import spectral_ds

SECTION = {**METHODS["depth-and-similarity-polynomial"], "monitor": {"enabled": False}}


MEANS = {
    **SECTION,
    "filter": {**SECTION["filter"], "temporal": {"decay": 0.5, "amplify": 0.5}},
    "statistics": {"interval": 1},
    "monitor": {"interval": 1},
}


def overflow_of_what_is_not_filtered(name):
    """A sound step, one that overflows on rank 1, a sound one: skipped steps, weights and means.

    Means over steps are those of the plugin.
    """
    training = Training(name, MEANS)
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
        means = torch.cat([mean.flatten() for mean in means]).numpy()
        found.append((training.engine.skipped_steps, training.snapshot(), means))
    metrics = plugin.metrics()
    training.close()
    return found, metrics


@pytest.mark.parametrize("name", ["zero1-fp16", "zero2-fp16-offload", "zero3-fp16"])
def test_an_overflow_on_one_rank_skips_the_step_on_all_and_leaves_no_trace(ranks, name):
    for (sound, overflow, later), metrics in ranks(2).run(overflow_of_what_is_not_filtered, name):
        assert (sound[0], overflow[0], later[0]) == (0, 1, 1)
        for before, same, other in zip(
            weights_and_means(sound),
            weights_and_means(overflow),
            weights_and_means(later),
            strict=True,
        ):
            assert np.isfinite(before).all()
            assert np.isfinite(other).all()
            np.testing.assert_array_equal(same, before)
        assert not np.array_equal(later[2], sound[2])
        assert any(not np.array_equal(v, sound[1][n]) for n, v in later[1].items())
        assert metrics["skipped_steps"] == 1
        assert np.isfinite(list(metrics.values())).all()


def weights_and_means(facts):
    _, weights, means = facts
    return [*weights.values(), means]


def step_with_infinite_gradient(name):
    """What is logged when a gradient of a torch engine, which skips no step, is not finite."""
    import logging

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append((record.levelname, record.getMessage()))
    logger = logging.getLogger("spectral_ds")
    logger.addHandler(handler)
    try:
        training = Training(name, {**SECTION, "monitor": {"interval": 1}})
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


class Underway(list):
    """Copies to the CPU that land when they are waited for, as those into pinned memory."""

    def synchronize(self):
        for target, values in self:
            target.copy_(values)
        self.clear()


def step_with_late_copies(name, section, is_late):
    """Weights after a step in which DeepSpeed has not waited for gradients on their way."""
    training = Training(name, section)
    zero, underway = training.engine.optimizer, Underway()

    def copy(parameter, copy=zero.async_inplace_copy_grad_to_fp32_buffer_from_gpu):
        group, _, first, length = zero.grad_position[zero.get_param_id(parameter)]
        target = zero.single_partition_of_fp32_groups[group].grad.narrow(0, first, length)
        before = target.clone()
        copy(parameter)
        underway.append((target, target.clone()))
        target.copy_(before)
        zero._pending_offload_events[get_accelerator().current_stream()] = underway

    if is_late:
        zero.async_inplace_copy_grad_to_fp32_buffer_from_gpu = copy
    training.step()
    weights = training.snapshot()
    training.close()
    return weights


def test_gradients_on_their_way_to_the_cpu_are_waited_for(ranks):
    section = {**SECTION, "operator": {"kernel": "torch_csr"}}
    at_once, late, bare = (
        ranks(1).run(step_with_late_copies, "zero2-offload", *each)[0]
        for each in ((section, False), (section, True), (None, True))
    )
    for parameter, weight in at_once.items():
        np.testing.assert_array_equal(late[parameter], weight)
    assert any((bare[parameter] != weight).any() for parameter, weight in at_once.items())


class Checkpointed(tiny.TinyLlama):
    """Recomputes activations in the backward pass."""

    def __init__(self, use_reentrant=False):
        super().__init__()
        self.llama.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        self.llama.train()


def steps_of_models(name):
    """Weights after a step of the usual model, and of one that recomputes activations."""
    found = []
    for model in (tiny.TinyLlama, Checkpointed):
        training = Training(name, SECTION, model=model)
        training.step()
        found.append(training.snapshot())
        training.close()
    return found


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2", "ddp"])
def test_activation_checkpointing_changes_nothing(ranks, name):
    usual, recomputed = ranks(2).run(steps_of_models, name)[0]
    for parameter, value in usual.items():
        np.testing.assert_allclose(recomputed[parameter], value, atol=1e-5, equal_nan=False)


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
        np.testing.assert_allclose(got[parameter], value, atol=2e-5, equal_nan=False)


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


def replicate(module):
    """In nn.DataParallel, which without GPUs calls the module itself."""
    wrapped = torch.nn.DataParallel(torch.nn.Identity())
    wrapped.module, wrapped.device_ids = module, []
    return wrapped


@pytest.mark.parametrize("wrap", [compile_eagerly, compile_ddp, replicate, wrap_in_checkpoints])
def test_compiled_and_wrapped_models_keep_their_names_and_results(ranks, wrap):
    usual, wrapped = ranks(1).run(wrapped_case, wrap)[0]
    assert wrapped["names"] == usual["names"]
    for parameter, value in usual["after"].items():
        np.testing.assert_allclose(wrapped["after"][parameter], value, atol=1e-6, equal_nan=False)


class Small(torch.nn.Module):
    """Little to compile."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(9, 9) for _ in range(3))

    def forward(self, tokens):
        x = tokens / 53
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def steps_of_small(name):
    """Weights after a step, and after that of the compiled model."""
    found = []
    for is_compiled in (False, True):
        training = Training(name, SECTION, model=Small, rates=(0.5, 0.25))
        if is_compiled and training.cell.engine == "deepspeed":
            training.engine.compile(backend="eager")
        elif is_compiled:
            training.wrapped = torch.compile(training.wrapped, backend="eager")
        training.step()
        found.append(training.snapshot())
        training.close()
    return found


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_sharded_models_may_be_compiled(ranks, name):
    usual, compiled = ranks(2).run(steps_of_small, name)[0]
    for parameter, value in compiled.items():
        plain_name = parameter.replace("_orig_mod.", "")
        np.testing.assert_allclose(value, usual[plain_name], atol=1e-6, equal_nan=False)


class Few(torch.nn.Module):
    """Fewer weights than some ranks would own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.few = torch.nn.Linear(2, 1)

    def forward(self, tokens):
        return self.few(tokens[:, :2] / 53).square().mean()


def metrics_of_few(name):
    """Metrics of the second step, and how many fragments this rank owns."""
    section = {"preset": "observe", "monitor": {"interval": 1}}
    training = Training(name, section, model=Few)
    training.train(2)
    found = training.plugin.metrics(), len(training.plugin.engine.fragments)
    training.close()
    return found


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_a_rank_that_owns_nothing_is_monitored(ranks, name):
    metrics, fragments = zip(*ranks(3).run(metrics_of_few, name), strict=True)
    assert min(fragments) == 0
    for other in metrics:
        assert other["update_to_weight/all"] == metrics[0]["update_to_weight/all"] > 0


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


def adapted_steps(name):
    """The facts of a step without the plugin, and with it."""
    training = Training(name, None, ThereAndBack, model=Adapted)
    found = steps_from_here(training, [None, SECTION])
    training.close()
    return found


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2", "ddp"])
def test_lora_adapters_are_filtered_and_frozen_weights_stay(ranks, name):
    plain, result = ranks(2).run(adapted_steps, name)[0]
    assert all("lora" in n for n in plain["gradients"])
    _, laplacian, expected = expected_update(SECTION, plain)
    assert np.count_nonzero(np.triu(laplacian, 1)) > 0
    assert relative_error(result["gradients"], expected) <= 1e-5
    for parameter in plain["weights"]:
        if "lora" not in parameter:
            np.testing.assert_array_equal(result["after"][parameter], plain["weights"][parameter])


def attach_by_hand_twice(name):
    """A loop that clips calls filter_gradients by hand; the hook must not filter again."""
    training = Training(name, SECTION, clipping=1e9)
    training.step()
    by_hand = training.snapshot()
    training.close()
    training = Training(name, SECTION)
    training.step()
    by_hook = training.snapshot()
    training.close()
    return by_hand, by_hook


@pytest.mark.parametrize("name", ["fsdp2", "ddp"])
def test_filtering_by_hand_replaces_the_hook(ranks, name):
    by_hand, by_hook = ranks(2).run(attach_by_hand_twice, name)[0]
    for parameter, value in by_hook.items():
        np.testing.assert_allclose(by_hand[parameter], value, atol=1e-6, equal_nan=False)
