"""One training step of the tiny model under every engine, precision and offload.

In: a `Cell` and the plugin's section, or None. Out: weights before and after, and the gradients
that the step applied, by parameter name, whole on every rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import numpy as np
import tiny
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import spectral_ds


@dataclass(frozen=True)
class Cell:
    """A row of the matrix. `stage` is None for torch engines."""

    engine: str
    stage: int | None = None
    precision: str = "fp32"
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    zero_init: bool = False
    offload: bool = False
    world_sizes: tuple[int, ...] = (1, 2, 3, 4)


OPTIMIZER_ON_CPU = {"offload_optimizer": {"device": "cpu"}}
PARAMETERS_ON_CPU = {**OPTIMIZER_ON_CPU, "offload_param": {"device": "cpu"}}
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}

CELLS = {
    **{f"zero{s}": Cell("deepspeed", s) for s in (0, 1, 2, 3)},
    **{
        f"zero{s}-offload": Cell("deepspeed", s, zero=OPTIMIZER_ON_CPU, offload=True)
        for s in (1, 2, 3)
    },
    "zero3-offload-parameters": Cell("deepspeed", 3, zero=PARAMETERS_ON_CPU, offload=True),
    "zero3-small-sub-groups": Cell("deepspeed", 3, zero={"sub_group_size": 2000}),
    "zero3-no-persistence": Cell("deepspeed", 3, zero={"stage3_param_persistence_threshold": 0}),
    "zero3-init": Cell("deepspeed", 3, zero_init=True),
    **{f"zero{s}-bf16": Cell("deepspeed", s, "bf16") for s in (0, 1, 2, 3)},
    **{
        f"zero{s}-bf16-fp32-accumulation": Cell("deepspeed", s, "bf16", config=FP32_ACCUMULATION)
        for s in (1, 2, 3)
    },
    **{
        f"zero{s}-bf16-offload": Cell("deepspeed", s, "bf16", zero=OPTIMIZER_ON_CPU, offload=True)
        for s in (1, 2, 3)
    },
    **{f"zero{s}-fp16": Cell("deepspeed", s, "fp16") for s in (1, 2, 3)},
    **{
        f"zero{s}-fp16-offload": Cell("deepspeed", s, "fp16", zero=OPTIMIZER_ON_CPU, offload=True)
        for s in (1, 2, 3)
    },
    "fsdp2": Cell("fsdp2"),
    "fsdp2-offload": Cell("fsdp2", offload=True),
    "fsdp2-bf16": Cell("fsdp2", precision="bf16"),
    "hsdp": Cell("hsdp", world_sizes=(2, 4)),
    "ddp": Cell("ddp"),
    "plain": Cell("plain", world_sizes=(1,)),
}


class Training:
    """The same few methods for every engine."""

    def __init__(
        self,
        cell: Cell,
        section: dict[str, Any] | None,
        optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
        rates: tuple[float, float] = tiny.SGD_RATES,
        accumulation: int = 1,
        clipping: float = 0.0,
        model: Any = tiny.TinyLlama,
    ) -> None:
        self.cell, self.accumulation, self.clipping = cell, accumulation, clipping
        if cell.engine == "deepspeed":
            self._start_deepspeed(section, optimizer, rates, model)
        else:
            self._start_torch(section, optimizer, rates, model)

    def attach(self, section: dict[str, Any]) -> None:
        """Attach the plugin to what has begun without it."""
        if self.cell.engine == "deepspeed":
            self.plugin = spectral_ds.attach(self.engine, config=section)
        else:
            self.plugin = spectral_ds.attach(self.wrapped, self.optimizer, section)

    def _start_deepspeed(self, section: Any, optimizer: Any, rates: Any, model: Any) -> None:
        cell = self.cell
        config = tiny.deepspeed_config(
            cell.stage,
            zero_optimization=cell.zero,
            gradient_accumulation_steps=self.accumulation,
            gradient_clipping=self.clipping,
            zero_force_ds_cpu_optimizer=False,
            **cell.config,
        )
        if cell.precision == "bf16":
            config["bf16"] = {"enabled": True}
        if cell.precision == "fp16":
            config["fp16"] = {"enabled": True, "initial_scale_power": 6}
        if section is not None:
            config["spectral_ds"] = section
        with fp16_allowed():
            context = deepspeed.zero.Init(config_dict_or_path=config) if cell.zero_init else None
            with context or nullcontext():
                module = model()
            self.engine, *_ = spectral_ds.initialize(
                model=module,
                optimizer=optimizer,
                model_parameters=tiny.parameter_groups(module, rates),
                config=config,
            )
        self.module = self.engine.module
        self.plugin = spectral_ds.plugin_of(self.engine)

    def _start_torch(self, section: Any, optimizer: Any, rates: Any, model: Any) -> None:
        cell = self.cell
        module = wrapped = model()
        if cell.engine in ("fsdp2", "hsdp"):
            shard(module, cell)
        elif cell.engine == "ddp":
            wrapped = torch.nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
        self.module, self.wrapped = module, wrapped
        self.optimizer = optimizer(tiny.parameter_groups(module, rates), lr=rates[0])
        self.plugin = None
        if section is not None:
            self.plugin = spectral_ds.attach(wrapped, self.optimizer, section)

    def step(self, index: int = 0, **arguments: Any) -> float:
        """One optimizer step; the loss on this rank."""
        losses = []
        micro_batches = tiny.batches(self.accumulation, index)
        for position, tokens in enumerate(micro_batches):
            if self.cell.engine == "deepspeed":
                loss = self.engine(tokens, **arguments)
                self.engine.backward(loss)
                self.engine.step()
            else:
                loss = self._micro_step(tokens, position == self.accumulation - 1, arguments)
            losses.append(loss.item())
        if self.cell.engine != "deepspeed":
            if self.clipping:
                if self.plugin is not None:
                    self.plugin.filter_gradients()
                torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clipping)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return sum(losses) / len(losses)

    def _micro_step(self, tokens: torch.Tensor, is_last: bool, arguments: Any) -> torch.Tensor:
        if self.cell.engine in ("fsdp2", "hsdp"):
            self.module.set_requires_gradient_sync(is_last)
        waits = self.cell.engine == "ddp" and not is_last
        with self.wrapped.no_sync() if waits else nullcontext():
            loss = self.wrapped(tokens, **arguments)
            (loss / self.accumulation).backward()
        return loss

    def snapshot(self) -> dict[str, np.ndarray]:
        """All parameters, whole, float32."""
        found = {}
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.cell.stage == 3):
                whole = parameter.detach()
                if hasattr(whole, "full_tensor"):
                    whole = whole.full_tensor()
                found[name] = whole.float().cpu().numpy().copy()
        return found

    def close(self) -> None:
        if self.cell.engine == "deepspeed":
            self.engine.destroy()
        elif self.plugin is not None:
            self.plugin.detach()


def shard(module: torch.nn.Module, cell: Cell) -> None:
    """fully_shard every layer and the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    world_size = dist.get_world_size()
    if cell.engine == "hsdp":
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world_size,))
    options: dict[str, Any] = {"mesh": mesh}
    if cell.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if cell.precision == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    for layer in module.modules():
        if isinstance(layer, LlamaDecoderLayer):
            fully_shard(layer, **options)
    fully_shard(module, **options)


@contextmanager
def fp16_allowed() -> Iterator[None]:
    """DeepSpeed's CPU accelerator refuses fp16, which works there."""
    accelerator = get_accelerator()
    usual = accelerator.is_fp16_supported
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        accelerator.is_fp16_supported = usual


def one_step(name: str, section: Any, accumulation: int = 1, clipping: float = 0.0) -> Any:
    """One SGD step of a cell: weights, gradients as applied, the plugin's facts."""
    training = Training(CELLS[name], section, accumulation=accumulation, clipping=clipping)
    before = training.snapshot()
    training.step()
    after = training.snapshot()
    rates = rates_by_name(training.module)
    facts = {
        "weights": before,
        "after": after,
        "gradients": {n: (before[n] - after[n]) / rate for n, rate in rates.items()},
        "rates": rates,
    }
    if training.plugin is not None:
        facts["metrics"] = training.plugin.metrics()
        facts["owned"] = [
            (f.parameter, f.start, f.length) for f in training.plugin.engine.fragments
        ]
        facts["sizes"] = {n: int(np.prod(s)) for n, s in training.plugin.engine.shapes.items()}
        facts["shard_ranks"] = training.plugin.engine.communicator.world_size
        facts["bytes_sent"] = sum(stage.plan.bytes_sent for stage in training.plugin.stack.graphs)
    training.close()
    return facts


def rates_by_name(module: torch.nn.Module) -> dict[str, float]:
    name_of = {id(p): n for n, p in module.named_parameters()}
    groups = tiny.parameter_groups(module)
    return {name_of[id(p)]: group["lr"] for group in groups for p in group["params"]}


def ten_steps(name: str, section: Any) -> dict[str, np.ndarray]:
    """Weights after ten AdamW steps."""
    training = Training(CELLS[name], section, torch.optim.AdamW, tiny.ADAM_RATES)
    for index in range(10):
        training.step(index)
    weights = training.snapshot()
    training.close()
    return weights
