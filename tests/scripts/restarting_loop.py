"""A training under torchrun that goes on from its newest checkpoint, and in which a fault may come.

In:  a folder; FAULT = raise, kill or nothing: what the last rank does in the filter of its fourth
     step, before torchrun has restarted anything.
Out: the weights after six steps in `weights.pt` of the folder, by rank 0.
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import spectral_ds

STEPS, FAULTY = 6, 3
# Its running mean is state that has to come back too.
SECTION = {
    "graph": {"node": "row", "edges": [{"family": "ring"}]},
    "filter": {"response": "tikhonov", "temporal": {"decay": 0.5, "amplify": 1.0}},
    "monitor": {"enabled": False},
}


def come_to_fault(plugin: spectral_ds.SpectralPlugin) -> None:
    """In the filter, when other ranks wait for what this one sends."""
    usual = plugin.stack.filter.apply

    def apply(*arguments: object) -> None:
        if plugin.engine.step == FAULTY:
            if os.environ["FAULT"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise MemoryError("no memory for the exchange")
        usual(*arguments)

    plugin.stack.filter.apply = apply


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    trained = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1)
    plugin = spectral_ds.attach(trained, optimizer, SECTION)
    saved = folder / "state.pt"
    first = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        plugin.load(folder / f"plugin-{first}")
    is_last = dist.get_rank() == dist.get_world_size() - 1
    if is_last and os.environ.get("FAULT") and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        come_to_fault(plugin)
    for step in range(first, STEPS):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        optimizer.zero_grad()
        trained(torch.randn(4, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        plugin.save(folder / f"plugin-{step + 1}")
        if dist.get_rank() == 0:
            state = {"step": step + 1, "model": model.state_dict()}
            torch.save({**state, "optimizer": optimizer.state_dict()}, folder / "unfinished.pt")
            (folder / "unfinished.pt").replace(saved)
        dist.barrier()
    if dist.get_rank() == 0:
        torch.save(model.state_dict(), folder / "weights.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
