"""Faults in the middle of a step: all ranks end, the reason is said, and nothing is lost."""

import time

import pytest
import torch
from launching import SCRIPTS, forked, launched

SCRIPT = SCRIPTS / "restarting_loop.py"
# Far below the half hour that a process group waits for ranks that are silent.
SECONDS_TO_END = 60


def trained(folder, engine, fault, restarts=0):
    """The script on two ranks: how it ended, and after how many seconds."""
    folder.mkdir(exist_ok=True)
    started = time.monotonic()
    ended = launched(
        *("torchrun", "--standalone", "--nproc_per_node", 2, "--max-restarts", restarts),
        *(SCRIPT, folder, engine),
        FAULT=fault,
        # Else ranks may be given the addresses of those before the restart (pytorch issue 135712).
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )
    return ended, time.monotonic() - started


def weights(folder):
    return torch.load(folder / "weights.pt", weights_only=True)


@pytest.fixture(scope="module", params=["ddp", "zero2"])
def uninterrupted(request, processes, tmp_path_factory):
    """The name of an engine, and the weights that it ends with."""
    folder = tmp_path_factory.mktemp(request.param)
    ended = forked(2, SCRIPT, folder, request.param, runner=False, TORCHELASTIC_RESTART_COUNT="0")
    assert ended.code == 0, ended.stderr
    return request.param, weights(folder)


def test_when_a_rank_is_killed_in_the_filter_torchrun_restarts_all_and_the_run_is_the_same(
    uninterrupted, tmp_path
):
    """From the newest checkpoint: to the bit."""
    engine, expected = uninterrupted
    ended, seconds = trained(tmp_path / "killed", engine, fault="kill", restarts=1)
    assert ended.code == 0, ended.stderr
    assert seconds < SECONDS_TO_END
    assert "restart 1 resumes at 3" in ended.stderr
    found = weights(tmp_path / "killed")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight)


def test_a_rank_that_raises_in_the_filter_ends_all_soon_and_says_why(processes, tmp_path):
    ended, seconds = trained(tmp_path / "raised", "ddp", fault="raise")
    assert ended.code != 0
    assert seconds < SECONDS_TO_END
    said, _, _ = ended.stderr.partition("closed by peer")  # what the others say, after it
    assert "MemoryError: no memory for the exchange" in said
    # What was saved before it is there.
    assert torch.load(tmp_path / "raised" / "state.pt", weights_only=True)["step"] == 3
