"""A training under torchrun that goes on from its newest checkpoint, and in which a fault may come.

In:  a folder; ddp or zero2; FAULT = raise, kill or nothing: what the last rank does in the filter
     of its fourth step, before torchrun has restarted anything.
Out: the weights after six steps in `weights.pt` of the folder, by rank 0, which says on stderr
     with which step it begins.
"""

import os
import signal
import sys
from collections.abc import Callable
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


class DataParallel:
    """By torch, with a checkpoint of the script's own."""

    def __init__(self, model: torch.nn.Module, folder: Path) -> None:
        dist.init_process_group("gloo")
        self._folder, self._weights = folder, model
        self._model = torch.nn.parallel.DistributedDataParallel(model)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        self.plugin = spectral_ds.attach(self._model, self._optimizer, SECTION)

    def step(self, loss: Callable[[torch.nn.Module], torch.Tensor]) -> None:
        self._optimizer.zero_grad()
        loss(self._model).backward()
        self._optimizer.step()

    def save(self, step: int) -> None:
        self.plugin.save(self._folder / f"plugin-{step}")
        if dist.get_rank() == 0:
            state = {"step": step, "model": self._weights.state_dict()}
            state["optimizer"] = self._optimizer.state_dict()
            torch.save(state, self._folder / "unfinished.pt")
            (self._folder / "unfinished.pt").replace(self._folder / "state.pt")
        dist.barrier()

    def resume(self) -> int:
        """The step to go on with."""
        if not (self._folder / "state.pt").exists():
            return 0
        state = torch.load(self._folder / "state.pt", weights_only=True)
        self._weights.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.plugin.load(self._folder / f"plugin-{state['step']}")
        return int(state["step"])


class Zero2:
    """By DeepSpeed, whose checkpoints carry the plugin's state."""

    def __init__(self, model: torch.nn.Module, folder: Path) -> None:
        import deepspeed

        # Takes a minute to compile.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
            "zero_optimization": {"stage": 2},
            "spectral_ds": SECTION,
        }
        self._engine, *_ = spectral_ds.initialize(
            model=model, model_parameters=model.parameters(), config=config
        )
        self._folder = folder / "checkpoints"
        self.plugin = spectral_ds.plugin_of(self._engine)

    def step(self, loss: Callable[[torch.nn.Module], torch.Tensor]) -> None:
        self._engine.backward(loss(self._engine))
        self._engine.step()

    def save(self, step: int) -> None:
        self._engine.save_checkpoint(str(self._folder), client_state={"step": step})

    def resume(self) -> int:
        """The step to go on with."""
        if not (self._folder / "latest").exists():
            return 0
        _, state = self._engine.load_checkpoint(str(self._folder))
        return int(state["step"])


ENGINES = {"ddp": DataParallel, "zero2": Zero2}


def main() -> None:
    folder, engine = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    training = ENGINES[engine](model, folder)
    first, restart = training.resume(), os.environ["TORCHELASTIC_RESTART_COUNT"]
    if dist.get_rank() == 0:
        print(f"restart {restart} resumes at {first}", file=sys.stderr, flush=True)
    is_last = dist.get_rank() == dist.get_world_size() - 1
    if is_last and os.environ.get("FAULT") and restart == "0":
        come_to_fault(training.plugin)
    for step in range(first, STEPS):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        inputs = torch.randn(4, 6, generator=generator)
        training.step(lambda called, inputs=inputs: called(inputs).square().mean())
        training.save(step + 1)
    if dist.get_rank() == 0:
        torch.save(model.state_dict(), folder / "weights.pt")
    # Together: a process that ends while a thread of gloo still holds tensors may abort.
    dist.barrier()
    dist.destroy_process_group()
    # All is saved. Torch may still abort at the interpreter's own end, which is not tested here.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
