"""Training scripts as launchers start them: by the launchers themselves, or quickly, by forks.

In: a script's name in tests/scripts and its arguments. Out: exit codes and what was written to
stderr.
"""

import faulthandler
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import ranks

# Of scripts, to the end of the process, as with an interpreter of their own.
_left: list[object] = []
SCRIPTS = Path(__file__).parent / "scripts"
TIMEOUT_SECONDS = 180
# For programs with an interpreter of their own: DeepSpeed's import of Muon compiles it, for which
# torch imports all of its compiler.
NOT_COMPILED = {"TORCHDYNAMO_DISABLE": "1"}


@dataclass(frozen=True)
class Ended:
    """How a program ended; of several ranks, the first code that is not 0, and all stderr."""

    code: int
    stderr: str


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launched(*words: object, **environment: str) -> Ended:
    """By a command of the environment, as a user types it."""
    program, *rest = map(str, words)
    binaries = Path(sys.executable).parent
    done = subprocess.run(
        [str(binaries / program), *rest],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        stdin=subprocess.DEVNULL,
        env=os.environ | NOT_COMPILED | {"PATH": f"{binaries}:{os.environ['PATH']}"} | environment,
    )
    return Ended(done.returncode, done.stderr)


def forked(
    world_size: int, script: object, *words: object, runner: bool = True, **environment: str
) -> Ended:
    """By processes that have imported torch already, in the environment that torchrun makes."""
    environment.update(
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=free_port(),
    )
    with tempfile.TemporaryDirectory() as logs:
        processes = []
        for rank in range(world_size):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = [str(script), *map(str, words)], runner, own, f"{logs}/{rank}"
            processes.append(ranks._context.Process(target=_child, args=arguments, daemon=True))
            processes[-1].start()
        for process in processes:
            process.join(TIMEOUT_SECONDS)
            process.kill()
            process.join()
        stderr = "".join(Path(logs, str(rank)).read_text() for rank in range(world_size))
    codes = [process.exitcode or 0 for process in processes]
    return Ended(next((code for code in codes if code), 0), stderr)


def _child(words: list[str], runner: bool, environment: dict[str, str], log: str) -> None:
    with open(log, "w") as file, open(os.devnull, "w") as nothing:
        os.dup2(file.fileno(), 2)
        os.dup2(nothing.fileno(), 1)
    os.environ.update(environment)
    faulthandler.dump_traceback_later(TIMEOUT_SECONDS - 10)  # to stderr: where it hangs
    import deepspeed
    import torch

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes a minute to compile
    torch.set_num_threads(1)
    if runner:
        from spectral_ds import run

        run.main(words)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))  # as the interpreter does
        _left.append(runpy.run_path(words[0], run_name="__main__"))


def assert_nothing_is_attached(stderr, words):
    """It is said once, with the reason."""
    assert stderr.count("NOTHING IS ATTACHED") == 1
    [reason] = stderr.partition("NOTHING IS ATTACHED")[2].split("\n")[1:2]
    for word in words:
        assert word in reason
