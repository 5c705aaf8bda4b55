"""What tests share in a session: pools of ranks.

With pytest-xdist (`-n 2 --dist loadfile`) each worker, and all that it starts, stays on a core of
its own: ranks that hand each other small messages gain nothing from a second one. With `--fast`,
tests that start a process are left out.
"""

import logging
import multiprocessing.process
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from ranks import DEVICE, RankPool, most_ranks
from ring_steps import SECTION as RING

import spectral_ds
from spectral_ds.attach.runner import Runner

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

pytest_plugins = ["nodes"]

hypothesis.settings.register_profile("long", max_examples=10_000, deadline=None)

# The files that take longest come first, so that workers end together.
FIRST = (
    "test_multinode",
    "test_launch",
    "test_engines",
    "test_device",
    "test_tensorboard",
    "test_run",
    "test_oracle",
    "test_checkpoints_deepspeed",
    "test_plan",
    "test_checkpoints",
    "test_updates",
    "test_checkpoints_dcp",
    "test_exchange",
    "test_observe",
    "test_callback",
    "test_activations_ranks",
    "test_checkpoints_killed",
    "test_checkpoints_finetune",
    "test_faults",
    "test_long_runs",
    "test_merge_refresh",
)
FAST = "--fast"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(FAST, action="store_true", help="leave out tests that start a process")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption(FAST):
        left_out = [item for item in items if "processes" in getattr(item, "fixturenames", ())]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = {name: place for place, name in enumerate(FIRST)}
        items.sort(key=lambda item: order.get(item.path.stem, len(FIRST)))


@pytest.fixture(scope="session")
def processes() -> None:
    """Asked for by all that starts a process, so that `--fast` knows it."""


@pytest.fixture(autouse=True)
def _no_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--fast`, a test that starts one without asking for `processes` fails."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("this starts a process: use the fixture `processes`")

    if request.config.getoption(FAST):
        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
        monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)


@pytest.fixture(scope="session")
def ranks(processes: None) -> Iterator[Callable[[int], RankPool]]:
    """`ranks(n)`: the pool of n ranks."""
    yield from _pools()


@pytest.fixture(scope="session")
def devices(processes: None) -> Iterator[Callable[[int], RankPool]]:
    """`devices(n)`: the pool of n ranks that train on a device, each on its own."""
    yield from _pools(SPECTRAL_DS_DEVICE=DEVICE if DEVICE != "cpu" else "apart")


def _pools(**environment: str) -> Iterator[Callable[[int], RankPool]]:
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size > most_ranks():
            pytest.skip(f"needs {world_size} devices")
        if world_size not in pools or not pools[world_size].is_alive:
            pools[world_size] = RankPool(world_size, **environment)
        return pools[world_size]

    yield pool
    for each in pools.values():
        each.close()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    """`said(level)`: what the package logged so far, a string a message; by itself, warnings."""
    caplog.set_level(logging.INFO, "spectral_ds")
    return lambda level=logging.WARNING: [
        record.getMessage() for record in caplog.records if record.levelno >= level
    ]


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """`script(text)` writes a script, with a module beside it that it can import."""
    (tmp_path / "helper.py").write_text("")

    def write(text: str) -> str:
        path = tmp_path / "train.py"
        path.write_text(text)
        return str(path)

    yield write
    sys.modules.pop("helper", None)


@pytest.fixture
def runner() -> Iterator[Runner]:
    """A runner that watches, with the section of `ring_steps`."""
    watching = Runner(spectral_ds.load_config(RING))
    watching.watch()
    yield watching
    watching.stop()
