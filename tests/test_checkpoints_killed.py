"""Killed at any moment of saving, what was saved before is there and usable."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import LATER, SAVED_AFTER, by_adamw
from ranks import RankPool, RanksFailedError

from spectral_ds.checkpoint import folder as state_files

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

restored = 0
killed_while_saving = 0
while killed_while_saving < 5:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        model, optimizer, plugin = attach()
        if restored > 0:
            plugin.load(sys.argv[1])
        while True:
            model(torch.randn(2, 200)).sum().backward()
            optimizer.step()
            os.write(writing, b"<")
            plugin.save(sys.argv[1])
            os.write(writing, b">")
    events = os.read(reading, 1) + os.read(reading, 1)
    time.sleep(random.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(writing)
    while found := os.read(reading, 2**16):
        events += found
    confirmed = restored + events.count(b">")
    model, optimizer, plugin = attach()
    plugin.load(sys.argv[1])
    restored = plugin.engine.step
    was_saving = int(events.endswith(b"<"))
    killed_while_saving += was_saving
    print(confirmed, restored, was_saving)
"""


@pytest.mark.usefixtures("processes")
def test_killed_while_saving_the_newest_complete_state_is_usable(tmp_path):
    """Each process goes on from what the one before it left, until five were killed in a save."""
    command = [sys.executable, "-W", "ignore", "-c", SAVER, str(tmp_path / "state")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    attempts = [tuple(map(int, line.split())) for line in result.stdout.splitlines()]
    for confirmed, restored, was_saving in attempts:
        assert confirmed <= restored <= confirmed + was_saving
    assert attempts[-1][0] > attempts[0][0]


def save_and_go_on(folder):
    training = by_adamw("zero2")
    training.train(SAVED_AFTER)
    training.engine.save_checkpoint(str(folder))
    losses = training.train(LATER, SAVED_AFTER)
    training.close()
    return losses


def resume(folder):
    training = by_adamw("zero2")
    path, _ = training.engine.load_checkpoint(str(folder))
    losses = training.train(LATER, SAVED_AFTER)
    training.close()
    return losses, path


def die(*_):
    """When all ranks are here."""
    torch.distributed.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_plugins_files(engine):
    """A file of each rank is written, and no manifest."""
    state_files._synchronize = die


def die_in_deepspeeds_files(engine):
    """The optimizer's file of each rank is cut off."""
    whole = engine.checkpoint_engine.save

    def save(state_dict, path):
        if "optim_states" not in str(path):
            return whole(state_dict, path)
        Path(path).write_bytes(b"cut")
        return die()

    engine.checkpoint_engine.save = save


def die_before_the_tag_is_named(engine):
    """All files are written."""
    engine.checkpoint_engine.commit = die


def resume_and_die_saving(folder, moment):
    """All ranks are killed in their second `save_checkpoint`."""
    training = by_adamw("zero2")
    training.engine.load_checkpoint(str(folder))
    training.train(LATER, SAVED_AFTER)
    moment(training.engine)
    training.engine.save_checkpoint(str(folder), tag="second")


@pytest.fixture(scope="module")
def first(ranks, tmp_path_factory):
    """The folder that two ranks saved into, and the losses of how they went on."""
    folder = tmp_path_factory.mktemp("first")
    return folder, ranks(2).run(save_and_go_on, folder)


@pytest.mark.parametrize(
    ("moment", "files"),
    [
        (die_in_plugins_files, ["spectral_ds/rank-00000-*", "spectral_ds/rank-00001-*"]),
        (
            die_in_deepspeeds_files,
            ["mp_rank_00_*", "*zero_pp_rank_0_*", "*zero_pp_rank_1_*"],
        ),
        (die_before_the_tag_is_named, ["mp_rank_00_*", "*zero_pp_rank_0_*"]),
    ],
)
def test_all_ranks_killed_while_saving_the_checkpoint_before_is_resumed(
    ranks, tmp_path, first, moment, files
):
    saved, expected = first
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    pool = RankPool(2)
    with pytest.raises(RanksFailedError, match="a rank died in resume_and_die_saving"):
        pool.run(resume_and_die_saving, folder, moment)
    for pattern in files:
        assert list((folder / "second").glob(pattern)), pattern
    is_whole = (folder / "second" / "spectral_ds" / "manifest.json").exists()
    assert is_whole == (moment is not die_in_plugins_files)
    for (losses, path), own in zip(ranks(2).run(resume, folder), expected, strict=True):
        assert f"global_step{SAVED_AFTER}/" in path
        np.testing.assert_allclose(losses, own, atol=1e-6)
