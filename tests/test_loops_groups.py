"""A model is trained by some of the ranks, or by fewer towards the end: nothing hangs, and what is
filtered is filtered by the right graph. On four ranks."""

import contextlib
import io
import logging
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from changing import (
    INPUTS,
    SECTION,
    Blocks,
    assert_is,
    filtered,
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
from spectral_ds.attach.runner import Runner

PAIR = [2, 3]  # ranks that train, while the others do something else


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
    ends = pytest.raises(RuntimeError, match="exhausted")
    with messages(logging.INFO) as found, ends, join:
        for index in range(1 + rank % 2):
            optimizer.zero_grad()
            loss_of(model, inputs[index]).backward()
            optimizer.step()
    steps, last = plugin.engine.step, plugin.metrics()["step"]
    plugin.detach()
    return steps, last, found


def test_a_join_that_ends_together_is_monitored(ranks):
    for steps, last, found in ranks(4).run(epoch_that_ends_with_the_first_rank):
        assert steps == 1
        assert last == 0
        assert found == []


# A sequence is spread over ranks


class Spread:
    """What Megatron tells DeepSpeed of all ranks that share each sequence."""

    def __init__(self):
        self._own = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        self._all = dist.new_group()

    def __getattr__(self, name):
        """Every `get_…_group`, `get_…_world_size` and `get_…_rank`."""
        if not name.startswith("get_"):
            raise AttributeError(name)
        group = self._all if "sequence" in name else self._own[dist.get_rank()]
        if name.endswith("_world_size"):
            return lambda: dist.get_world_size(group)
        return (lambda: dist.get_rank(group)) if name.endswith("_rank") else lambda: group


def steps_that_share_sequences(folder):
    """Two ranks save, and go on from it: weights, files and who spoke."""
    from deepspeed.utils import groups

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "spectral_ds": {**SECTION, "monitor": {"interval": 1, "folder": str(folder / "events")}},
    }
    model = Blocks()
    groups.mpu = None
    try:
        with messages(logging.INFO) as found:
            engine, *_ = spectral_ds.initialize(
                model=model, optimizer=sgd(model.parameters()), mpu=Spread(), config=config
            )
        for _ in range(2):
            engine.backward(loss_of(engine, INPUTS.chunk(2)[dist.get_rank()]) / 2)
            engine.step()
        engine.save_checkpoint(str(folder), tag="both")
        engine.load_checkpoint(str(folder), tag="both")
        members = spectral_ds.plugin_of(engine).engine.everyone.world_size
        engine.destroy()
    finally:
        groups.mpu = None
    weights = [parameter.detach().numpy() for parameter in model.parameters()]
    return weights, members, bool(found)


def test_ranks_that_share_sequences_train_together(ranks, tmp_path):
    first, second = ranks(2).run(steps_that_share_sequences, tmp_path)
    for one, other in zip(first[0], second[0], strict=True):
        np.testing.assert_array_equal(one, other)
    assert (first[1], second[1]) == (2, 2)
    assert (first[2], second[2]) == (True, False)
    assert len(list((tmp_path / "both" / "spectral_ds").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "events").glob("events*"))) == 1
