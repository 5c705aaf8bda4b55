"""What is trained changes, or is trained by some of the ranks, or by fewer towards the end: nothing
hangs, and what is filtered is filtered by the right graph. On four ranks."""

import contextlib
import io
import logging
import sys
import time

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from test_loops_change import Blocks, assert_is, filtered, filtered_on, frozen, sgd
from torch.nn.parallel import DistributedDataParallel

import spectral_ds
from spectral_ds.attach.runner import Runner

SECTION = {
    "graph": {"edges": [{"family": "depth"}, {"family": "similarity", "neighbours": 3}]},
    "filter": {"response": "polynomial", "coefficients": [1.0, -0.4, 0.05], "strength": 0.8},
    "monitor": {"interval": 1},
    "operator": {"kernel": "torch_csr"},
}
PAIR = [2, 3]  # ranks that train, while the others do something else
INPUTS = torch.randn(32, 6, generator=torch.Generator().manual_seed(2))


@contextlib.contextmanager
def messages(level=logging.WARNING):
    """What the package logs meanwhile."""
    found, handler = [], logging.Handler(level)
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("spectral_ds")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def watching(section=SECTION):
    """A runner, and what it prints."""
    said, runner = io.StringIO(), Runner(spectral_ds.load_config(section))
    runner.watch()
    try:
        with contextlib.redirect_stderr(said):
            yield said
    finally:
        runner.stop()


class WithRoot(Blocks):
    """Has a parameter of its own beside its layers."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((6, 6), 0.5))

    def forward(self, inputs):
        return super().forward(inputs @ self.scale)


def loss_of(model, inputs):
    return model(inputs).square().sum()


def whole(module):
    """All parameters, whole."""
    return {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone().numpy()
        for n, p in module.named_parameters()
    }


def mean_gradients(ranks, model):
    """Averaged over the inputs of some ranks, by name."""
    inputs = INPUTS.chunk(4)
    (sum(loss_of(model, inputs[rank]) for rank in ranks) / len(ranks)).backward()
    return {n: p.grad.numpy() for n, p in model.named_parameters()}


def train_step(model, module, optimizer, rank):
    """What a step subtracts from the whole parameters."""
    before = whole(module)
    optimizer.zero_grad()
    loss_of(model, INPUTS.chunk(4)[rank]).backward()
    optimizer.step()
    after = whole(module)
    return {name: before[name] - after[name] for name in before}


def shard(module, mesh, each_layer=True):
    from torch.distributed.fsdp import fully_shard

    for layer in module.layers if each_layer else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


# Not the whole world


def steps_of_a_pair():
    """Two ranks train, by one engine after another; the others are not there."""
    from torch.distributed.device_mesh import DeviceMesh

    rank, group, other = dist.get_rank(), dist.new_group(PAIR), dist.new_group(PAIR)
    meshes = (
        DeviceMesh("cpu", PAIR),
        DeviceMesh("cpu", [[r] for r in PAIR], mesh_dim_names=("replicate", "shard")),
    )
    if rank not in PAIR:
        return None
    steps, spoke = {}, []
    ddp = DistributedDataParallel(Blocks(), process_group=group)
    models = {"ddp": ddp, "fsdp2": shard(Blocks(), meshes[0]), "hsdp": shard(Blocks(), meshes[1])}
    for name, model in models.items():
        module = getattr(model, "module", model)
        optimizer = sgd(module.parameters())
        with messages(logging.INFO) as found:
            plugin = spectral_ds.attach(model, optimizer, SECTION)
            steps[name] = train_step(model, module, optimizer, rank)
            plugin.detach()
        spoke.append(bool(found))
    with watching() as said:
        model = DistributedDataParallel(Blocks(), process_group=group)
        optimizer = sgd(model.parameters())
        steps["runner"] = train_step(model, model.module, optimizer, rank)
    both = [DistributedDataParallel(Blocks(), process_group=each) for each in (group, other)]
    together = torch.nn.ModuleList(both)
    with pytest.raises(spectral_ds.UnsupportedEngineError, match="several process groups"):
        spectral_ds.attach(together, sgd(together.parameters()), SECTION)
    return steps, spoke, said.getvalue()


def test_a_group_of_its_own_trains_while_other_ranks_do_something_else(ranks):
    results = ranks(4).run(steps_of_a_pair)
    assert results[:2] == [None, None]
    wanted = filtered(Blocks(), mean_gradients(PAIR, Blocks()))
    for index, (steps, spoke, said) in enumerate(results[2:]):
        assert len(steps) == 4
        for step in steps.values():
            assert_is(step, wanted)
        is_first = index == 0
        assert spoke == [is_first] * 3
        assert ("attached to SGD of DistributedDataParallel" in said) == is_first


def attach_late(section):
    """Rank 0 comes after the others have lost patience."""
    initialize = sys.modules["spectral_ds.attach.initialize"]
    usual, initialize.SECONDS_OF_PATIENCE = initialize.SECONDS_OF_PATIENCE, 0.2
    model = Blocks()
    if dist.get_rank() == 0:
        time.sleep(0.5)
    with messages() as found:
        spectral_ds.attach(model, sgd(model.parameters()), section).detach()
    initialize.SECONDS_OF_PATIENCE = usual
    return found


def test_a_rank_that_waits_for_others_says_so(ranks):
    for rank, found in enumerate(ranks(4).run(attach_late, SECTION)):
        assert rank == 0 or len(found) == 1  # on a slow machine, rank 0 waits too
        assert all(f"rank {rank} of 4 still waits" in each for each in found)


# Ranks that leave early

JOIN_SECTION = {
    "graph": {"edges": [{"family": "depth"}], "refresh_interval": 2},
    "filter": {
        "response": "window",
        "strength": 0.8,
        "warmup_steps": 9,
        "temporal": {"decay": 0.5, "amplify": 1.0},
    },
    "monitor": {"interval": 1},
    "operator": {"kernel": "best"},
}
LENGTHS = [1, 3, 0, 2]  # steps that each rank has inputs for


def epochs_with_uneven_inputs(by_runner):
    """Two epochs in `join()`, and a step after them that all ranks take."""
    rank = dist.get_rank()
    model = DistributedDataParallel(Blocks())
    inputs = INPUTS.chunk(4)[rank].split(2)
    runner, plugin, graph = Runner(spectral_ds.load_config(JOIN_SECTION)), None, None
    with messages(logging.INFO) as found, contextlib.redirect_stderr(io.StringIO()):
        if by_runner:
            runner.watch()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if not by_runner:
            plugin = spectral_ds.attach(model, optimizer, JOIN_SECTION)
            graph = plugin.graph
        for _ in range(2):
            with model.join():
                plugin = plugin or spectral_ds.plugin_of(model)
                graph = graph or plugin.graph
                for index in range(LENGTHS[rank]):
                    optimizer.zero_grad()
                    loss_of(model, inputs[index]).backward()
                    optimizer.step()
        steps = plugin.engine.step
        monitored = plugin.metrics()
        is_rebuilt = plugin.graph is not graph
        optimizer.zero_grad()
        loss_of(model, inputs[3]).backward()
        optimizer.step()
        runner.stop()
    state = {n: t.numpy().copy() for n, t in plugin.state_dict().items()}
    metrics = plugin.metrics()
    plugin.detach()
    said = [message for message in found if "join()" in message]
    return steps, monitored, is_rebuilt, metrics["step"], said, whole(model.module), state


def weights_of_the_last_rank():
    """The same in one process: rank 1 takes all steps."""
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    section = {**JOIN_SECTION, "monitor": {"enabled": False}}
    plugin = spectral_ds.attach(model, optimizer, section)
    parts = [part.split(2) for part in INPUTS.chunk(4)]
    for index in (0, 1, 2, 0, 1, 2, 3):
        optimizer.zero_grad()
        here = [rank for rank, length in enumerate(LENGTHS) if index < length or index == 3]
        (sum(loss_of(model, parts[rank][index]) for rank in here) / 4).backward()
        optimizer.step()
    plugin.detach()
    return whole(model)


@pytest.mark.parametrize("by_runner", [False, True])
def test_ranks_may_leave_a_join_early(ranks, by_runner):
    results = ranks(4).run(epochs_with_uneven_inputs, by_runner)
    wanted = weights_of_the_last_rank()
    for rank, (steps, monitored, is_rebuilt, last, said, weights, state) in enumerate(results):
        assert steps == 6  # of the last rank, on all of them
        assert monitored == {}
        assert is_rebuilt
        assert last == 6
        assert len(said) == (rank == 0)
        for name, value in wanted.items():
            np.testing.assert_allclose(weights[name], value, atol=1e-6)
        for name, value in results[0][-1].items():
            np.testing.assert_array_equal(state[name], value)


def attaching_inside():
    """By hand and by the runner, which finds an optimizer that was built there."""
    model = DistributedDataParallel(Blocks())
    section = spectral_ds.load_config(JOIN_SECTION)
    refusals = []
    with watching(JOIN_SECTION) as said:
        for _ in range(2):
            with model.join():
                optimizer = sgd(model.parameters())
                if dist.get_rank() != 1:
                    loss_of(model, INPUTS).backward()
                    try:
                        spectral_ds.attach(model, optimizer, section)
                    except spectral_ds.UnsupportedEngineError as error:
                        refusals.append(str(error))
                    optimizer.step()
    plugin = spectral_ds.attach(model, optimizer, section)  # after it all ranks are there
    plugin.detach()
    return refusals, said.getvalue()


def test_attaching_inside_a_join_is_refused(ranks):
    for rank, (refusals, said) in enumerate(ranks(4).run(attaching_inside)):
        assert len(refusals) == (0 if rank == 1 else 2)
        assert all("attach before" in each for each in refusals)
        assert said.count("built inside join()") == (2 if rank == 0 else 0)
        assert ("attached to SGD" in said) == (rank == 0)  # the first one, by the second join()


def epoch_that_ends_with_the_first_rank():
    """All ranks stop together; those that had more inputs raise."""
    rank = dist.get_rank()
    model = DistributedDataParallel(Blocks())
    optimizer = sgd(model.parameters())
    plugin = spectral_ds.attach(model, optimizer, JOIN_SECTION)
    inputs = INPUTS.chunk(4)[rank].split(2)
    join = model.join(throw_on_early_termination=True)
    with messages(logging.INFO) as found, contextlib.suppress(RuntimeError), join:
        for index in range(1 + rank % 2):
            optimizer.zero_grad()
            loss_of(model, inputs[index]).backward()
            optimizer.step()
    step = plugin.metrics()["step"]
    plugin.detach()
    return step, found


def test_a_join_that_ends_together_is_monitored(ranks):
    for step, found in ranks(4).run(epoch_that_ends_with_the_first_rank):
        assert step == 0
        assert found == []


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
            assert [("one of shape (6, 6) outside of" in each) for each in found] == [True] * (
                rank == 0
            )
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
        before = [train_step(model, module, optimizer, rank)]
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
    for rank, (_, weights, step, nodes, said) in enumerate(results):
        model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
        gradients = {}
        model.zero_grad()
        (sum(loss_of(model, part) for part in INPUTS.chunk(4)) / 4).backward()
        gradients = {n: p.grad.numpy() for n, p in model.named_parameters()}
        assert_is(step, filtered_on(weights, model, gradients))
        assert nodes == 21
        assert len(said) == (rank == 0)


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
        assert_is(step, filtered_on(built, model, gradients))
        assert len(said) == (rank == 0)
        if rank == 0:
            assert "layers.2.weight, layers.2.bias" in said[0]
            assert ("not filtered" in said[0]) == (stage > 0)


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
            printed_so_far = printed.getvalue()
            runner_said = printed_so_far
        said.append((runner_said, logged))
    return len(results), tuple(out.shape), attached, found, message, said


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (3, "fp32"), (0, "bf16")])
def test_an_engine_without_an_optimizer_has_nothing_to_filter(ranks, stage, precision):
    for rank, result in enumerate(ranks(4).run(reference_models, stage, precision)):
        count, shape, attached, found, message, said = result
        assert (count, shape, attached) == (4, (32, 6), None)
        assert len(found) == (rank == 0)
        assert all("nothing to filter in Blocks: " in each for each in found)
        assert "no optimizer" in message
        assert all(logged == [] for _, logged in said)


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
