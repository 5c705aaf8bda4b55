"""A long run leaks nothing: memory, tensors, files, threads, process groups are as many at its end.

LONG_RUN_STEPS=2000 makes it longer, which takes two minutes or three.
"""

import ctypes
import gc
import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.tensorboard import SummaryWriter

import spectral_ds

STEPS = int(os.environ.get("LONG_RUN_STEPS", "240"))
# All that happens now and then has happened some times by then.
WARM = STEPS // 2
GROWTH = 0.01
# A thread of gloo holds what it has summed last, for a while.
GLOO_THREADS = 2
SECTION = {
    "graph": {
        "edges": [{"family": "similarity", "neighbours": 3, "features": "gradient"}],
        "refresh_interval": 40,
    },
    "filter": {"response": "wiener", "bands": 4},
    "regularizer": {"strength": 1e-3},
    "statistics": {"interval": 5},
    "monitor": {"interval": 10, "figures_interval": 80},
}
ACTIVATIONS = {
    "graph": {"node": "column", "edges": [{"family": "activations", "rank": 4, "keep": "given",
                                           "learn": "training", "samples": 8, "length": 8}],
              "refresh_interval": 40},
    "filter": {"response": "tikhonov", "apply_to": "update"},
    "regularizer": {"strength": 1e-3, "coupling": "decoupled"},
    "monitor": {"interval": 10, "figures_interval": 80},
}  # fmt: skip


def held():
    """Bytes that are resident, tensors, open files, threads, process groups."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is no part of it
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    groups = len(dist.distributed_c10d._world.pg_map)
    resident = pages * os.sysconf("SC_PAGESIZE")
    return resident, tensors, len(files), threading.active_count(), groups


def long_run(section, folder):
    """What is held once all has happened some times, and at the end."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(13, 13) for _ in range(3)])
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    writer = SummaryWriter(folder) if dist.get_rank() == 0 else None
    plugin = spectral_ds.attach(model, optimizer, section, writer=writer)
    if "node" in section["graph"]:
        plugin.calibrate([torch.randn(20, 13)])
    found = []
    for step in range(STEPS):
        model(torch.randn(8, 13)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            plugin.save(Path(folder) / "state")
        if step + 1 in (WARM, STEPS):
            found.append(held())
    plugin.detach()
    if writer is not None:
        writer.close()
    return found


@pytest.mark.parametrize("section", [SECTION, ACTIVATIONS], ids=["similarity", "activations"])
def test_a_long_run_holds_no_more_at_its_end(ranks, tmp_path, section):
    for before, after in ranks(2).run(long_run, section, str(tmp_path)):
        (memory, tensors, *others), (memory_at_end, tensors_at_end, *others_at_end) = before, after
        assert memory_at_end <= (1 + GROWTH) * memory
        assert tensors_at_end <= tensors + GLOO_THREADS
        assert others_at_end == others
