"""Runs a training script that knows nothing of spectral_ds, with the plugin attached.

    deepspeed [LAUNCHER OPTIONS] --module spectral_ds.run TRAIN.py [ARGUMENTS]
    torchrun  [LAUNCHER OPTIONS] -m spectral_ds.run TRAIN.py [ARGUMENTS]
    python -m spectral_ds.run TRAIN.py [ARGUMENTS]

In: the section "spectral_ds" of the script's own DeepSpeed config, or the file that the environment
variable SPECTRAL_DS_CONFIG names, which wins. Out: what the script gives, its exit status included;
on stderr, what the plugin was attached to, or why to nothing.
"""

import os
import runpy
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from spectral_ds.attach.own_ranks import OwnRanks
from spectral_ds.attach.runner import Runner, config_of_environment, rank
from spectral_ds.config import SpectralConfigError

# What a script leaves lives as long as the interpreter, as it does without the runner: models that
# wait for other threads when they are destroyed would hang here.
_left: list[dict[str, Any]] = []

USAGE = """usage: python -m spectral_ds.run TRAIN.py [ARGUMENTS]
       python -m spectral_ds.run -m MODULE [ARGUMENTS]

Runs a training script with spectral_ds attached to what it trains. Launchers start it like this:
  deepspeed --num_gpus 2 --module spectral_ds.run TRAIN.py --deepspeed_config ds_config.json
  SPECTRAL_DS_CONFIG=spectral.yaml torchrun --nproc_per_node 2 -m spectral_ds.run TRAIN.py
"""
# What DeepSpeed's launcher, and an old one of torch, put before the script's name.
LAUNCHER_ARGUMENTS = ("--local_rank=", "--local-rank=")
# Exit status for wrong input, as argparse has it.
WRONG_INPUT = 2
# The launcher ends all ranks as soon as one has ended; rank 0 has the message.
SECONDS_FOR_RANK_0 = 2.0


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script; returns when it ends, and lets through what it raises.

    Args:
        argv: the script and its arguments; by default those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    from_launcher = []
    while words and words[0].startswith(LAUNCHER_ARGUMENTS):
        from_launcher.append(words.pop(0))
    if words[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return
    is_module = words[:1] == ["-m"]
    if is_module:
        words.pop(0)
    if not words or words[0].startswith("-"):
        _stop(USAGE.rstrip())
    target, *arguments = words
    if not is_module and not Path(target).is_file():
        _stop(f"spectral_ds.run: {target}: no such file")
    if not is_module:
        target = os.path.abspath(target)  # as Python has a script's __file__, also after a chdir
    try:
        runner = Runner(config_of_environment())
        with _started_as(target, [*from_launcher, *arguments], is_module), _watched(runner):
            if is_module:
                _left.append(runpy.run_module(target, run_name="__main__", alter_sys=True))
            else:
                _left.append(runpy.run_path(target, run_name="__main__"))
    except SpectralConfigError as error:
        _stop("\n".join(f"spectral_ds.run: {line}" for line in str(error).splitlines()))


@contextmanager
def _watched(runner: Runner) -> Iterator[None]:
    """Attach to what is trained inside; at a good end, say if that was nothing."""
    runner.watch()
    try:
        yield
    except SystemExit as end:
        if not end.code:
            runner.report()
        raise
    else:
        runner.report()
    finally:
        runner.stop()


@contextmanager
def _started_as(target: str, arguments: list[str], is_module: bool) -> Iterator[None]:
    """The words and the search path that Python would have given the script itself.

    Ranks that it starts by the same words run under the runner too.
    """
    argv, path = sys.argv, list(sys.path)
    sys.argv = [target, *arguments]
    own_ranks = OwnRanks(target, is_module)
    # Under python -m, the first place is the folder where it was started; a module keeps it.
    if not is_module and not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(Path(target).resolve().parent)
    try:
        yield
    finally:
        own_ranks.remove()
        sys.argv = argv
        sys.path[:] = path


def _stop(message: str) -> NoReturn:
    """End this rank for wrong input; rank 0 says why.

    If that has not ended the first rank of another machine, the input may be wrong there alone, so
    that it says why too.
    """
    if rank() > 0:
        time.sleep(SECONDS_FOR_RANK_0)
        message = f"{message} (rank {rank()}, {socket.gethostname()})"
    if rank() == 0 or os.environ.get("LOCAL_RANK") == "0":
        print(message, file=sys.stderr, flush=True)
    sys.exit(WRONG_INPUT)


if __name__ == "__main__":
    main()
