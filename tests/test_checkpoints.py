"""Nothing is lost: a resumed run is the run that would have happened, at any world size and engine;
files that cannot be used are named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.distributed.checkpoint as dcp
from cells import CELLS, Training

import spectral_ds

STATEFUL = {
    "graph": {
        "edges": [
            {"family": "similarity", "features": "gradient", "sketch_width": 8},
            {"family": "depth"},
        ],
        "refresh_interval": 3,
    },
    "filter": {
        "response": "wiener",
        "bands": 4,
        "strength": 0.8,
        "warmup_steps": 7,
        "temporal": {"decay": 0.5, "amplify": 0.3},
    },
    "statistics": {"interval": 1, "decay": 0.9},
    "regularizer": {"strength": 0.05, "ridge": 0.5, "coupling": "decoupled"},
    "monitor": {"interval": 1},
}
RATES = (0.2, 0.1)
SAVED_AFTER, LATER = 4, 5


class Prepared(tiny.TinyLlama):
    """Begins with weights from a file, if there are any."""

    source: Path | None = None

    def __init__(self) -> None:
        super().__init__()
        if Prepared.source is not None:
            found = np.load(Prepared.source)
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    parameter.copy_(torch.from_numpy(found[name]))


def start(name, weights=None, section=STATEFUL):
    Prepared.source = weights
    try:
        return Training(CELLS[name], section, rates=RATES, model=Prepared)
    finally:
        Prepared.source = None


def run_on(training, first, last):
    """Losses of some steps and the weights after them."""
    losses = [training.step(index) for index in range(first, last)]
    weights = training.snapshot()
    metrics = training.plugin.metrics()
    training.close()
    return losses, weights, metrics


def save_and_go_on(name, folder):
    """Save the plugin and the weights after four steps, then go on for five."""
    training = start(name)
    for index in range(SAVED_AFTER):
        training.step(index)
    training.plugin.save(folder / "spectral_ds")
    if torch.distributed.get_rank() == 0:
        np.savez(folder / "weights.npz", **training.snapshot())
    else:
        training.snapshot()
    return run_on(training, SAVED_AFTER, SAVED_AFTER + LATER)


def resume(name, folder):
    training = start(name, folder / "weights.npz")
    training.plugin.load(folder / "spectral_ds")
    if training.cell.engine == "deepspeed":
        training.engine.global_steps = SAVED_AFTER  # its own checkpoint would restore it
    return run_on(training, SAVED_AFTER, SAVED_AFTER + LATER)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, ranks(2).run(save_and_go_on, "zero2", folder)


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        ("plain", 1),
        ("zero2", 2),
        ("zero3", 3),
        ("zero1", 4),
        ("fsdp2", 4),
        ("hsdp", 4),
        ("ddp", 2),
        ("zero3-offload", 2),
    ],
)
def test_a_resumed_run_is_the_run_that_would_have_happened(ranks, saved, name, world_size):
    folder, uninterrupted = saved
    results = ranks(world_size).run(resume, name, folder)
    _, weights, metrics = uninterrupted[0]
    for _, got, got_metrics in results:
        for parameter, value in weights.items():
            np.testing.assert_allclose(got[parameter], value, atol=1e-4)
        assert got_metrics["edges"] == metrics["edges"]
        np.testing.assert_allclose(
            got_metrics["signal_to_noise/total"], metrics["signal_to_noise/total"], rtol=1e-2
        )
        np.testing.assert_allclose(got_metrics["regularizer"], metrics["regularizer"], rtol=1e-2)
    mean = [np.mean([r[0] for r in runs], axis=0) for runs in (results, uninterrupted)]
    np.testing.assert_allclose(mean[0], mean[1], atol=1e-4)


def test_without_the_state_the_run_would_differ(ranks, saved):
    folder, uninterrupted = saved
    bare = ranks(2).run(resume_without_state, folder)[0]
    worst = max(np.abs(bare[1][n] - w).max() for n, w in uninterrupted[0][1].items())
    assert worst > 1e-3


def resume_without_state(folder):
    training = start("zero2", folder / "weights.npz")
    training.engine.global_steps = SAVED_AFTER
    return run_on(training, SAVED_AFTER, SAVED_AFTER + LATER)


def deepspeed_round_trip(stage, folder, tag_steps):
    """(five more steps, the same after loading into a new engine) with AdamW."""

    def fresh(section=STATEFUL):
        config = {**tiny.deepspeed_config(stage), "spectral_ds": section}
        return tiny.make_engine(config, torch.optim.AdamW, tiny.ADAM_RATES)

    engine = fresh()
    tiny.train(engine, tag_steps)
    engine.save_checkpoint(str(folder), client_state={"mine": 7})
    expected = steps_from(engine, tag_steps)
    engine.destroy()
    engine = fresh()
    _, client_state = engine.load_checkpoint(str(folder))
    got = steps_from(engine, tag_steps)
    engine.destroy()
    return expected, got, client_state["mine"]


def steps_from(engine, first):
    losses = []
    for index in range(first, first + LATER):
        (tokens,) = tiny.batches(1, index)
        loss = engine(tokens)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_checkpoints_carry_the_state(ranks, tmp_path, stage):
    for expected, got, mine in ranks(2).run(deepspeed_round_trip, stage, tmp_path, SAVED_AFTER):
        np.testing.assert_allclose(got, expected, atol=1e-6)
        assert mine == 7
    tag = (tmp_path / "latest").read_text().strip()
    manifest = json.loads((tmp_path / tag / "spectral_ds" / "manifest.json").read_text())
    assert len(manifest["files"]) == 2


def save_without_plugin(folder):
    engine = tiny.make_engine(tiny.deepspeed_config(2), torch.optim.AdamW, tiny.ADAM_RATES)
    tiny.train(engine, 1)
    engine.save_checkpoint(str(folder))
    engine.destroy()


def load_with(folder, section):
    config = tiny.deepspeed_config(2)
    if section is not None:
        config["spectral_ds"] = section
    engine = tiny.make_engine(config, torch.optim.AdamW, tiny.ADAM_RATES)
    try:
        path, _ = engine.load_checkpoint(str(folder))
        return path is not None, steps_from(engine, 1)
    finally:
        engine.destroy()


def save_with_plugin(folder):
    config = {**tiny.deepspeed_config(2), "spectral_ds": STATEFUL}
    engine = tiny.make_engine(config, torch.optim.AdamW, tiny.ADAM_RATES)
    tiny.train(engine, 1)
    engine.save_checkpoint(str(folder), tag="first")
    engine.destroy()


def test_checkpoints_made_with_or_without_the_plugin_load_without_or_with_it(ranks, tmp_path):
    ranks(2).run(save_without_plugin, tmp_path / "bare")
    assert ranks(2).run(load_with, tmp_path / "bare", STATEFUL)[0][0]
    ranks(2).run(save_with_plugin, tmp_path / "with")
    assert ranks(2).run(load_with, tmp_path / "with", None)[0][0]


def change_bytes(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def change_manifest(folder, key, value):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest[key] = value(manifest[key])
    path.write_text(json.dumps(manifest))


def first_file(folder):
    return sorted(folder.glob("rank-*.safetensors"))[0]


DAMAGES = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "cut manifest": (
        lambda f: (f / "manifest.json").write_text('{"version": 2'),
        "manifest.json cannot be read",
    ),
    "other version": (
        lambda f: change_manifest(f, "version", lambda v: v + 1),
        "is of version 3",
    ),
    "file without checksum": (
        lambda f: change_manifest(f, "files", lambda files: [{"name": files[0]["name"]}]),
        "must have name, bytes and sha256",
    ),
    "no file": (lambda f: first_file(f).unlink(), "safetensors is missing"),
    "cut file": (
        lambda f: first_file(f).write_bytes(first_file(f).read_bytes()[:-5]),
        "bytes, not",
    ),
    "altered file": (lambda f: change_bytes(first_file(f)), "is altered"),
    "other model": (
        lambda f: change_manifest(f, "model", lambda m: {**m, "llama.model.norm.weight": [25]}),
        "parameter 'llama.model.norm.weight' has shape (25,) there and (24,) here",
    ),
    "other graph": (
        lambda f: change_manifest(f, "graphs", lambda g: ["0" * 64]),
        "another graph configuration",
    ),
    "nothing": (shutil.rmtree, "manifest.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_used_is_named_on_every_rank(ranks, tmp_path, saved, damage):
    folder = tmp_path / "spectral_ds"
    shutil.copytree(saved[0] / "spectral_ds", folder)
    harm, message = DAMAGES[damage]
    harm(folder)
    for outcome in ranks(2).outcomes(load_damaged, folder, True):
        assert outcome.kind == "CheckpointError"
        assert message in outcome.message
    assert ranks(2).run(load_damaged, folder, False) == [True, True]


def load_damaged(folder, strict):
    training = start("zero2", section={**STATEFUL, "checkpoint": {"strict": strict}})
    (stage,) = training.plugin.stages
    graph = stage.graph
    try:
        training.plugin.load(folder)
        training.step()
        return stage.graph is not graph
    finally:
        training.close()


NOTHING_BUT_EDGES = {"monitor": {"enabled": False}, "graph": {"laplacian": "combinatorial"}}


def laplacian(training):
    names = [node.name for node in training.plugin.stages[0].parameters]
    return training.plugin.graph.laplacian(names).toarray()


def save_edges(name, folder):
    training = start(name, section=NOTHING_BUT_EDGES)
    training.plugin.save(folder)
    found = laplacian(training)
    training.close()
    return found


def load_edges(name, folder):
    """After a step, the weights would make another graph."""
    training = start(name, section=None)
    training.step(0)
    training.attach(NOTHING_BUT_EDGES)
    fresh = laplacian(training)
    training.plugin.load(folder)
    found = laplacian(training)
    training.close()
    return fresh, found


@pytest.mark.parametrize(
    ("name", "world_size", "other", "other_size", "files"),
    [
        ("zero2", 2, "zero3", 3, 2),
        ("zero3", 3, "fsdp2", 2, 3),
        ("hsdp", 4, "zero2", 2, 2),
        ("ddp", 2, "hsdp", 4, 1),
    ],
)
def test_the_graph_is_saved_whole_also_where_there_is_nothing_else(
    ranks, tmp_path, name, world_size, other, other_size, files
):
    expected = ranks(world_size).run(save_edges, name, tmp_path)[0]
    assert len(list(tmp_path.glob("rank-*"))) == files
    for fresh, found in ranks(other_size).run(load_edges, other, tmp_path):
        assert np.abs(fresh - expected).max() > 1e-2
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_step_that_is_taken_again_after_loading_is_filtered_again(tmp_path):
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plugin = spectral_ds.attach(model, optimizer, {"monitor": {"interval": 1}})

    def step():
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return plugin.metrics()["step"]

    step()
    plugin.save(tmp_path)
    assert step() == 1
    plugin.load(tmp_path)
    plugin.monitor.metrics = {"step": -1.0}
    assert step() == 1


def through_dcp(name, folder):
    """Save by DCP after four steps, go on; load into a new training, go on."""
    training = start(name)
    for index in range(SAVED_AFTER):
        training.step(index)
    dcp.save({"plugin": training.plugin.state_dict()}, checkpoint_id=folder / "dcp")
    weights = training.snapshot()
    if torch.distributed.get_rank() == 0:
        np.savez(folder / "weights.npz", **weights)
    return run_on(training, SAVED_AFTER, SAVED_AFTER + LATER)


def from_dcp(name, folder):
    training = start(name, folder / "weights.npz")
    state = {"plugin": training.plugin.state_dict()}
    dcp.load(state, checkpoint_id=folder / "dcp")
    training.plugin.load_state_dict(state["plugin"])
    return run_on(training, SAVED_AFTER, SAVED_AFTER + LATER)


@pytest.mark.parametrize(
    ("name", "world_size", "other", "other_size"),
    [("fsdp2", 2, "fsdp2", 3), ("ddp", 2, "plain", 1), ("fsdp2", 3, "fsdp2", 3)],
)
def test_torch_distributed_checkpoint(ranks, tmp_path, name, world_size, other, other_size):
    expected = ranks(world_size).run(through_dcp, name, tmp_path)[0]
    for got in ranks(other_size).run(from_dcp, other, tmp_path):
        for parameter, value in expected[1].items():
            np.testing.assert_allclose(got[1][parameter], value, atol=1e-4)
        assert got[2]["edges"] == expected[2]["edges"]


SAVER = """
import os, random, signal, sys, time, torch, spectral_ds
torch.set_num_threads(1)
torch.manual_seed(0)
random.seed(0)

def attach():
    model = torch.nn.Sequential(*[torch.nn.Linear(200, 200) for _ in range(4)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    section = {"regularizer": {"strength": 1e-3}, "monitor": {"enabled": False}}
    return model, optimizer, spectral_ds.attach(model, optimizer, section)

for attempt in range(10):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        model, optimizer, plugin = attach()
        if attempt > 0:
            plugin.load(sys.argv[1])
        while True:
            model(torch.randn(2, 200)).sum().backward()
            optimizer.step()
            plugin.save(sys.argv[1])
            os.write(writing, plugin.engine.step.to_bytes(8, "big"))
    first = os.read(reading, 8)
    time.sleep(random.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(writing)
    confirmed = first
    while found := os.read(reading, 8):
        confirmed = found
    plugin = attach()[2]
    plugin.load(sys.argv[1])
    print(int.from_bytes(confirmed, "big"), plugin.engine.step)
"""


def test_killed_while_saving_the_newest_complete_state_is_usable(tmp_path):
    """Each of ten processes goes on from what the one before it left, and is killed in its turn."""
    command = [sys.executable, "-W", "ignore", "-c", SAVER, str(tmp_path / "state")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    steps = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    assert len(steps) == 10
    assert all(confirmed <= restored <= confirmed + 1 for confirmed, restored in steps)
    assert steps[-1][0] > steps[0][0]


def save_for_conversion(folder):
    config = {**tiny.deepspeed_config(2), "spectral_ds": STATEFUL}
    engine = tiny.make_engine(config, torch.optim.AdamW, tiny.ADAM_RATES)
    tiny.train(engine, SAVED_AFTER)
    engine.save_checkpoint(str(folder), tag="mine")
    steps_from(engine, SAVED_AFTER)
    weights = tiny.snapshot(engine)
    engine.destroy()
    return weights


def load_converted(folder):
    config = {
        **tiny.deepspeed_config(1),
        "spectral_ds": STATEFUL,
        "checkpoint": {"load_universal": True},
    }
    engine = tiny.make_engine(config, torch.optim.AdamW, tiny.ADAM_RATES)
    engine.load_checkpoint(str(folder), tag="mine_universal")
    steps_from(engine, SAVED_AFTER)
    weights = tiny.snapshot(engine)
    engine.destroy()
    return weights


def test_universal_checkpoints_find_the_state_at_another_world_size(ranks, tmp_path):
    expected = ranks(2).run(save_for_conversion, tmp_path)[0]
    command = [sys.executable, "-W", "ignore", "-m", "deepspeed.checkpoint.ds_to_universal"]
    folders = ["--input_folder", tmp_path / "mine", "--output_folder", tmp_path / "mine_universal"]
    options = ["--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]
    subprocess.run([*command, *map(str, folders), *options], check=True, capture_output=True)
    for weights in ranks(4).run(load_converted, tmp_path):
        for name, value in expected.items():
            np.testing.assert_allclose(weights[name], value, atol=1e-4)


def test_saving_can_be_switched_off(ranks, tmp_path):
    ranks(1).run(save_switched_off, tmp_path)
    assert not list(tmp_path.glob("*/spectral_ds"))


def save_switched_off(folder):
    section = {**STATEFUL, "checkpoint": {"enabled": False}}
    config = {**tiny.deepspeed_config(2), "spectral_ds": section}
    engine = tiny.make_engine(config)
    engine.save_checkpoint(str(folder))
    assert spectral_ds.plugin_of(engine) is not None
    engine.destroy()
