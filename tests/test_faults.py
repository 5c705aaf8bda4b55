"""Faults in the middle of a step: all ranks end, the reason is said, and nothing is lost."""

import time

import pytest
import torch
from launching import SCRIPTS, launched

SCRIPT = SCRIPTS / "restarting_loop.py"
# Far below the half hour that a process group waits for ranks that are silent.
SECONDS_TO_END = 60


def trained(folder, fault=""):
    """The script on two ranks: how it ended, and after how many seconds."""
    folder.mkdir(exist_ok=True)
    started = time.monotonic()
    ended = launched("torchrun", "--standalone", "--nproc_per_node", 2, SCRIPT, folder, FAULT=fault)
    return ended, time.monotonic() - started


@pytest.fixture(scope="module")
def uninterrupted(processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    ended, _ = trained(folder)
    assert ended.code == 0, ended.stderr
    return torch.load(folder / "weights.pt", weights_only=True)


def test_a_rank_that_is_killed_in_the_filter_ends_all_and_a_restart_gives_the_same_run(
    uninterrupted, tmp_path
):
    """From the newest checkpoint: to the bit."""
    ended, seconds = trained(tmp_path / "killed", fault="kill")
    assert ended.code != 0
    assert seconds < SECONDS_TO_END
    ended, _ = trained(tmp_path / "killed")
    assert ended.code == 0, ended.stderr
    found = torch.load(tmp_path / "killed" / "weights.pt", weights_only=True)
    for name, weight in uninterrupted.items():
        assert torch.equal(found[name], weight)


def test_a_rank_that_raises_in_the_filter_ends_all_ranks_soon_and_says_why(processes, tmp_path):
    ended, seconds = trained(tmp_path / "raised", fault="raise")
    assert ended.code != 0
    assert seconds < SECONDS_TO_END
    assert "MemoryError: no memory for the exchange" in ended.stderr
    # What was saved before it is there.
    state = torch.load(tmp_path / "raised" / "state.pt", weights_only=True)
    assert state["step"] == 3
