"""What tests share in a session: pools of ranks, and one run of the quickstart."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import corpus
import pytest
from ranks import RankPool

QUICKSTART_STEPS = 11
TIMEOUT_SECONDS = 300


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(n)`: the pool of n ranks."""
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size not in pools or not pools[world_size].is_alive:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool
    for each in pools.values():
        each.close()


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the quickstart's results on a tiny model, and what it printed.

    With SPECTRAL_DS_QUICKSTART=runs/quickstart the folder of a run that there is already.
    """
    if there := os.environ.get("SPECTRAL_DS_QUICKSTART"):
        return Path(there).resolve(), ""
    folder = tmp_path_factory.mktemp("quickstart")
    corpus.write(folder)
    command = ["bash", Path(__file__).parent.parent / "launch" / "quickstart.sh"]
    command += ["--steps", QUICKSTART_STEPS, "--tokens", 16, "--out", folder / "runs"]
    command += ["--model", folder / "model", "--data", folder / "reviews.tsv"]
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs", done.stdout
