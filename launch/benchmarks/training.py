"""Training under one engine, on the ranks that a launcher started, with the plugin or without."""

import functools
import os
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

import spectral_ds
from spectral_ds.engines import engine_for

ENGINES = ("plain", "ddp", "fsdp2", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Place:
    """Where this rank trains."""

    device: torch.device
    engine: str
    in_bf16: bool

    @property
    def stage(self) -> int | None:
        """Of ZeRO."""
        return int(self.engine[-1]) if self.engine.startswith("zero") else None


class Training:
    """A model that an engine trains, without the plugin at first."""

    def __init__(self, model: Any, place: Place, folder: str) -> None:
        self.place = place
        if place.stage is not None:
            self._start_deepspeed(model, place.stage, folder)
        else:
            self._start_torch(model, folder)

    def _start_deepspeed(self, model: Any, stage: int, folder: str) -> None:
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
            "bf16": {"enabled": self.place.in_bf16},
            "zero_optimization": {"stage": stage},
            "tensorboard": {"enabled": True, "output_path": folder, "job_name": "steps"},
        }
        parameters = list(model.parameters())
        self.trained, *_ = deepspeed.initialize(
            model=model, model_parameters=parameters, config=config
        )
        self.adapter = functools.partial(engine_for, self.trained)
        self._attach = functools.partial(spectral_ds.attach, self.trained)

    def _start_torch(self, model: Any, folder: str) -> None:
        if self.place.engine == "fsdp2":
            policy = MixedPrecisionPolicy(torch.bfloat16 if self.place.in_bf16 else None)
            for layer in model.model.layers:
                fully_shard(layer, mp_policy=policy)
            fully_shard(model, mp_policy=policy)
        self.trained = DistributedDataParallel(model) if self.place.engine == "ddp" else model
        optimizer = self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        writer = SummaryWriter(folder) if is_first() else None
        self.adapter = functools.partial(engine_for, self.trained, optimizer)
        self._attach = functools.partial(spectral_ds.attach, self.trained, optimizer, writer=writer)

    def attach(self, section: dict[str, Any]) -> spectral_ds.SpectralPlugin:
        """Attach the plugin."""
        plugin = self._attach(config=section)
        assert plugin is not None, "enabled"
        return plugin

    def step(self, tokens: torch.Tensor) -> None:
        """One optimizer step."""
        if self.place.stage is not None:
            self.trained.backward(self.trained(input_ids=tokens, labels=tokens).loss)
            self.trained.step()
            return
        casts = self.place.in_bf16 and self.place.engine != "fsdp2"
        with torch.autocast("cuda", torch.bfloat16) if casts else nullcontext():
            loss = self.trained(input_ids=tokens, labels=tokens).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def section_of(method: str) -> dict[str, Any]:
    """The configuration of PRESET or PRESET@DTYPE, which exchanges numbers of that dtype."""
    preset, _, dtype = method.partition("@")
    return {"preset": preset, **({"operator": {"exchange_dtype": dtype}} if dtype else {})}


def is_first() -> bool:
    """Whether this rank is the one that speaks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def largest(value: float) -> float:
    """The value of the rank where it is largest (collective)."""
    found = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized():
        found = found.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def start(name: str) -> torch.device:
    """This rank's device, once the process group is there if a launcher started several."""
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device
