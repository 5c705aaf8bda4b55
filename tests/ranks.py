"""A pool of ranks on this machine that stays up for many checks.

In: a function of a test module and its arguments. Out: what it returned on each rank. A rank that
raises reports its error; a rank that hangs ends the pool. Ranks are of gloo on the CPU; where
SPECTRAL_DS_DEVICE is `cuda`, of NCCL, each on a device of its own; where it is `apart`, see there.
"""

import multiprocessing as mp
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

TIMEOUT_SECONDS = 120

# What all ranks train on that are not asked to train elsewhere.
DEVICE = os.environ.get("SPECTRAL_DS_DEVICE", "cpu")

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cuda" if DEVICE == "cuda" else "cpu",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GLOO_SOCKET_IFNAME": "lo",
}
os.environ.update(ENVIRONMENT)

# A process that is forked cannot use a device that its parent has looked for.
_context: Any = mp.get_context("spawn" if DEVICE == "cuda" else "forkserver")
# What each rank, and each script that `launching` forks, would import again for itself: in seconds.
mp.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "torch.utils.tensorboard",
        "torch_sparse",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "transformers.trainer",
        "transformers.models.llama.modeling_llama",
        "peft",
        "matplotlib.backends.backend_agg",
        "pytest",
        "spectral_ds.run",
    ]
)


def device() -> str:
    """What this rank trains on."""
    return os.environ.get("SPECTRAL_DS_DEVICE", DEVICE)


def most_ranks() -> int:
    """How many ranks a pool can have here."""
    import torch

    return torch.cuda.device_count() if DEVICE == "cuda" else 4


@dataclass(frozen=True)
class RankError:
    """What a rank raised."""

    kind: str
    message: str
    traceback: str


class RanksFailedError(AssertionError):
    """At least one rank raised or hung."""


class RankPool:
    """`world_size` processes in one process group, with `environment` beside this process's own.

    All pools are forked from one server, which keeps the environment of the first pool.
    """

    def __init__(self, world_size: int, **environment: str) -> None:
        self.world_size = world_size
        self._store = Path(tempfile.mkdtemp()) / "store"
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(world_size):
            ours, theirs = _context.Pipe()
            arguments = (rank, world_size, str(self._store), theirs, environment)
            process = _context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The function's result on each rank; raises if any rank raised."""
        results = self.outcomes(function, *args)
        errors = [
            f"rank {rank}: {result.traceback}"
            for rank, result in enumerate(results)
            if isinstance(result, RankError)
        ]
        if errors:
            raise RanksFailedError("\n".join(errors))
        return results

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Each rank's result or RankError."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        deadline = monotonic() + TIMEOUT_SECONDS
        while len(results) < self.world_size:
            waiting = [p for rank, p in enumerate(self._pipes) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - monotonic()))
            if not ready:
                missing = sorted(set(range(self.world_size)) - results.keys())
                self.close()
                raise RanksFailedError(
                    f"ranks {missing} hung in {function.__name__}; others: {results}"
                )
            for pipe in ready:
                try:
                    results[self._pipes.index(pipe)] = pipe.recv()
                except EOFError:
                    self.close()
                    raise RanksFailedError(f"a rank died in {function.__name__}") from None
        return [results[rank] for rank in range(self.world_size)]

    @property
    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        shutil.rmtree(self._store.parent, ignore_errors=True)


def _serve(
    rank: int, world_size: int, store: str, pipe: Connection, environment: dict[str, str]
) -> None:
    """Run what comes through the pipe, until it closes."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    import faulthandler
    import gc

    import deepspeed
    import torch
    from deepspeed.utils import logger

    faulthandler.enable()
    torch.set_num_threads(1)
    torch.set_printoptions(threshold=0, edgeitems=1)  # ZeRO-3 writes each weight into a string
    logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device() == "cuda":
        torch.cuda.set_device(rank)
    if device() == "apart":
        import apart

        apart.use()
        BACKENDS[apart.NAME] = apart.BACKEND
    torch.distributed.init_process_group(
        BACKENDS[device()],
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
    )
    gc.freeze()  # modules stay: collecting all of them after each engine takes half a second
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(function(*args))
        except Exception as error:
            pipe.send(RankError(type(error).__name__, str(error), traceback.format_exc()))
