"""What is trained changes where ranks train together: what joins is filtered by the right graph on
all of them, what cannot is named. On four ranks."""

import contextlib
import logging

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from changing import (
    INPUTS,
    SECTION,
    Blocks,
    as_arrays,
    assert_is,
    filtered,
    filtered_on,
    frozen,
    loss_of,
    mean_gradients,
    sgd,
    shard,
    train_step,
    watching,
    whole,
)
from said import messages
from torch.nn.parallel import DistributedDataParallel

import spectral_ds


class WithRoot(Blocks):
    """Has a parameter of its own beside its layers."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((6, 6), 0.5))

    def forward(self, inputs):
        return super().forward(inputs @ self.scale)


# What is trained


def step_after_an_evaluation(each_layer):
    """A forward pass without a backward one leaves the root's parameters gathered."""
    from torch.distributed.device_mesh import init_device_mesh

    model = WithRoot() if each_layer else Blocks()
    module = shard(model, init_device_mesh("cpu", (4,)), each_layer)
    optimizer = sgd(module.parameters())
    with torch.no_grad():
        module(INPUTS)
    plugin = spectral_ds.attach(module, optimizer, SECTION)
    step = train_step(module, module, optimizer, dist.get_rank())
    plugin.detach()
    with torch.no_grad():
        module(INPUTS)
    late = sgd(module.parameters())  # of gathered parameters, which no gradient reaches
    try:
        with messages() as found:
            plugin = spectral_ds.attach(module, late, SECTION)
            train_step(module, module, late, dist.get_rank())
            plugin.detach()
    except spectral_ds.UnsupportedEngineError as error:
        found = [str(error)]
    return step, found


@pytest.mark.parametrize("each_layer", [True, False])
def test_an_evaluation_before_attaching_changes_nothing(ranks, each_layer):
    model = WithRoot() if each_layer else Blocks()
    wanted = filtered(model, mean_gradients(range(4), model))
    for rank, (step, found) in enumerate(ranks(4).run(step_after_an_evaluation, each_layer)):
        assert_is(step, wanted)
        if each_layer:
            assert len(found) == (rank == 0)
            assert all("one of shape (6, 6) outside of" in each for each in found)
        else:
            assert "reshard()" in found[0]


def steps_with_an_unfrozen_layer(engine):
    """A step, then layer 2 joins; what each subtracted, and what was said."""
    from torch.distributed.device_mesh import init_device_mesh

    rank, module = dist.get_rank(), Blocks()
    if engine == "fsdp2":
        frozen(module, 2)
        model = module = shard(module, init_device_mesh("cpu", (4,)))
    else:
        model = DistributedDataParallel(module, find_unused_parameters=True)
        frozen(module, 2)
    optimizer = sgd(module.parameters())
    with messages(logging.INFO) as found:
        plugin = spectral_ds.attach(model, optimizer, SECTION)
        before = train_step(model, module, optimizer, rank)
        weights = whole(module)
        module.layers[2].requires_grad_(True)
        step = train_step(model, module, optimizer, rank)
        nodes = plugin.metrics()["nodes"]
        plugin.detach()
    return before, weights, step, nodes, [m for m in found if "trained from" in m]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_an_unfrozen_layer_joins_on_all_ranks(ranks, engine):
    results = ranks(4).run(steps_with_an_unfrozen_layer, engine)
    model = Blocks()
    start = mean_gradients(range(4), Blocks())
    start = filtered(model, {n: g for n, g in start.items() if "layers.2" not in n})
    for rank, (before, weights, step, nodes, said) in enumerate(results):
        assert_is(before, start)
        model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        model.zero_grad()
        (sum(loss_of(model, part) for part in INPUTS.chunk(4)) / 4).backward()
        gradients = {n: p.grad.numpy() for n, p in model.named_parameters()}
        assert_is(step, filtered_on(weights, gradients))
        assert nodes == 21
        assert len(said) == (rank == 0)


def steps_around_a_move(by_runner):
    """What a step subtracted after the model was moved, with its gradients; weights before it."""
    from torch.distributed.device_mesh import init_device_mesh

    def take():
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1e9)
        sgd_step()

    module = shard(Blocks(), init_device_mesh("cpu", (4,)))
    with watching() if by_runner else contextlib.nullcontext():
        optimizer = sgd(module.parameters())
        sgd_step, optimizer.step = optimizer.step, take
        if not by_runner:
            spectral_ds.attach(module, optimizer, SECTION)
        steps = []
        for _ in range(2):
            weights = whole(module)
            steps.append((weights, train_step(module, module, optimizer, dist.get_rank())))
            module.cpu()
        spectral_ds.plugin_of(module).detach()
    return steps


@pytest.mark.parametrize("by_runner", [False, True])
def test_a_sharded_model_may_be_moved(ranks, by_runner):
    """torch does so by swapping its tensors."""
    for steps in ranks(4).run(steps_around_a_move, by_runner):
        model = Blocks()
        for weights, step in steps:
            model.load_state_dict({n: torch.from_numpy(value) for n, value in weights.items()})
            model.zero_grad()
            wanted = filtered_on(as_arrays(Blocks(), weights), mean_gradients(range(4), model))
            assert_is(step, wanted)


def step_of_two_models(kind):
    """One optimizer over two models, under the runner."""
    from torch.distributed.device_mesh import init_device_mesh

    rank, modules = dist.get_rank(), [Blocks(2), Blocks(3)]
    if kind == "ddp":
        models = [DistributedDataParallel(module) for module in modules]
    elif kind == "fsdp2":
        models = [shard(module, init_device_mesh("cpu", (4,))) for module in modules]
    else:
        models = modules
    optimizer = sgd([p for module in modules for p in module.parameters()])
    inputs = INPUTS.chunk(4)[rank] if kind != "plain" else INPUTS
    with watching({**SECTION, "graph": {"edges": [{"family": "ring"}]}}) as said:
        before = [whole(module) for module in modules]
        loss_of(models[1], models[0](inputs)).backward()
        optimizer.step()
        after = [whole(module) for module in modules]
        plugin = spectral_ds.plugin_of(models[0])
        is_one = plugin is spectral_ds.plugin_of(models[1])
        names = list(plugin.engine.shapes)
    del models, modules
    return [{n: b[n] - a[n] for n in b} for b, a in zip(before, after, strict=True)], (
        is_one,
        names,
        said.getvalue(),
    )


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "plain"])
def test_one_optimizer_of_two_models_is_attached_to_both(ranks, kind):
    modules = [Blocks(2), Blocks(3)]
    parts = INPUTS.chunk(4)
    scale = 1 if kind == "plain" else 1 / 4
    sum(loss_of(modules[1], modules[0](part)) * scale for part in parts).backward()
    section = {**SECTION, "graph": {"edges": [{"family": "ring"}]}}
    wanted = [
        filtered(m, {n: p.grad.numpy() for n, p in m.named_parameters()}, section) for m in modules
    ]
    for rank, (steps, (is_one, names, said)) in enumerate(ranks(4).run(step_of_two_models, kind)):
        for step, value in zip(steps, wanted, strict=True):
            assert_is(step, value)
        assert is_one
        assert len(names) == 10
        assert ("attached to SGD of " in said) == (rank == 0)
        assert "elsewhere" not in said


# DeepSpeed


def unfrozen_under_deepspeed(stage):
    """One layer is unfrozen after a step: what the next one subtracts, and what was said."""
    import deepspeed

    model = frozen(LossOf(), 2)
    config = tiny.deepspeed_config(stage, spectral_ds=SECTION)
    engine, *_ = spectral_ds.initialize(
        model=model, optimizer=sgd(model.parameters()), config=config
    )
    rank = dist.get_rank()
    with messages(logging.INFO) as found:
        for number in range(2):
            if number == 1:
                model.layers[2].requires_grad_(True)
            before = gathered(deepspeed, model)
            engine.backward(engine(INPUTS.chunk(4)[rank]))
            engine.step()
        after = gathered(deepspeed, model)
    step = {name: before[name] - after[name] for name in before}
    engine.destroy()
    return before, step, [m for m in found if "trained from" in m or "not filtered" in m]


class LossOf(Blocks):
    def forward(self, inputs):
        return super().forward(inputs).square().sum()


def gathered(deepspeed, model):
    found = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.detach().numpy().copy()
    return found


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_an_unfrozen_layer_joins_in_stage_0_and_is_named_in_others(ranks, stage):
    results = ranks(4).run(unfrozen_under_deepspeed, stage)
    model = Blocks()
    for rank, (weights, step, said) in enumerate(results):
        model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        model.zero_grad()
        (sum(loss_of(model, part) for part in INPUTS.chunk(4)) / 4).backward()
        gradients = {n: p.grad.numpy() for n, p in model.named_parameters()}
        if stage > 0:
            gradients = {n: g for n, g in gradients.items() if "layers.2" not in n}
            start = Blocks()
            built = {n: p.detach().numpy() for n, p in start.named_parameters() if n in gradients}
        else:
            built = weights
        assert_is(step, filtered_on(built, gradients))
        assert len(said) == (rank == 0)
        if rank == 0:
            assert "layers.2.weight, layers.2.bias" in said[0]
            assert ("not filtered" in said[0]) == (stage > 0)


def left_under_deepspeed():
    """What a step subtracts after a layer that is trained on has left the optimizer."""
    model = LossOf()
    optimizer = sgd(model.parameters())
    config = tiny.deepspeed_config(0, spectral_ds=SECTION)
    engine, *_ = spectral_ds.initialize(model=model, optimizer=optimizer, config=config)
    optimizer.param_groups[0]["params"] = list(model.layers[:2].parameters())
    before = whole(model)
    engine.backward(engine(INPUTS.chunk(4)[dist.get_rank()]))
    engine.step()
    engine.destroy()
    return {name: before[name] - value for name, value in whole(model).items()}


def test_what_has_left_the_optimizer_counts_as_zeros_in_stage_0(ranks):
    gradients = mean_gradients(range(4), Blocks())
    zeros = {n: np.zeros_like(g) for n, g in gradients.items() if "layers.2" in n}
    for step in ranks(4).run(left_under_deepspeed):
        assert_is(step, filtered(Blocks(), gradients | zeros) | zeros)


def reference_models(stage, precision):
    """A model without an optimizer, with the section in its config: by hand and by the runner."""
    import deepspeed

    config = tiny.deepspeed_config(stage, spectral_ds=SECTION)
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    model = frozen(Blocks(), 0, 1, 2)
    with messages(logging.INFO) as found:
        results = spectral_ds.initialize(model=model, config=config)
    engine = results[0]
    out = engine(INPUTS.to(torch.bfloat16 if precision == "bf16" else torch.float32))
    attached = spectral_ds.plugin_of(engine)
    try:
        spectral_ds.attach(engine)
    except spectral_ds.UnsupportedEngineError as error:
        message = str(error)
    engine.destroy()
    said = []
    for module in (spectral_ds, deepspeed):
        with watching() as printed, messages(logging.INFO) as logged:
            module.initialize(model=frozen(Blocks(), 0, 1, 2), config=config)[0].destroy()
            printed.runner.report()
        said.append((printed.getvalue(), logged))
    return len(results), tuple(out.shape), attached, found, message, said


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (3, "fp32"), (0, "bf16")])
def test_an_engine_without_an_optimizer_has_nothing_to_filter(ranks, stage, precision):
    for rank, result in enumerate(ranks(4).run(reference_models, stage, precision)):
        count, shape, attached, found, message, said = result
        assert (count, shape, attached) == (4, (32, 6), None)
        assert len(found) == (rank == 0)
        assert all("nothing to filter in Blocks: " in each for each in found)
        assert "no optimizer" in message
        for printed, logged in said:
            assert printed.count("NOTHING IS ATTACHED") == (rank == 0)
            assert printed.count("engine of Blocks") == printed.count("no optimizer") == (rank == 0)
            assert logged == []


def frozen_with_an_optimizer():
    model = frozen(Blocks(), 0, 1, 2)
    optimizer = sgd(model.parameters())
    engine, *_ = spectral_ds.initialize(
        model=model, optimizer=optimizer, config=tiny.deepspeed_config(0, spectral_ds=SECTION)
    )
    attached = spectral_ds.plugin_of(engine)
    engine.destroy()
    return attached


def test_an_optimizer_of_frozen_parameters_has_nothing_to_filter(ranks):
    assert ranks(4).run(frozen_with_an_optimizer) == [None] * 4
