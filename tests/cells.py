"""Training steps of the tiny model under every engine, precision and offload.

In: a `Cell` and the plugin's section, or None. Out: weights before and after, and the gradients
that a step applied, by parameter name, whole on every rank.
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
from ranks import device
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


class ThereAndBack(torch.optim.SGD):
    """SGD, until `is_back`: then a step takes the one before it back, to the bit.

    So many steps begin with the same weights, on one engine: what it copies, it copies back.
    """

    is_back = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if self.is_back:
                    parameter.copy_(state["before"])
                    continue
                state["before"] = parameter.detach().clone()
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"])


class Training:
    """The same few methods for every engine.

    `cell` is one or its name; `config` are more keys of DeepSpeed's configuration.
    """

    def __init__(
        self,
        cell: Cell | str,
        section: dict[str, Any] | None = None,
        optimizer: Any = torch.optim.SGD,
        rates: tuple[float, float] = tiny.SGD_RATES,
        accumulation: int = 1,
        clipping: float = 0.0,
        model: Any = tiny.TinyLlama,
        initialize: Any = spectral_ds.initialize,
        **config: Any,
    ) -> None:
        cell = CELLS[cell] if isinstance(cell, str) else cell
        self.cell, self.accumulation, self.clipping = cell, accumulation, clipping
        self._initialize, self._config = initialize, config
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
        )
        if cell.precision == "bf16":
            config["bf16"] = {"enabled": True}
        if cell.precision == "fp16":
            config["fp16"] = {"enabled": True, "initial_scale_power": 6}
        config = {**config, **cell.config, **self._config}
        if section is not None:
            config["spectral_ds"] = section
        with fp16_allowed():
            context = deepspeed.zero.Init(config_dict_or_path=config) if cell.zero_init else None
            with context or nullcontext():
                module = model()
            if not cell.zero_init:
                module.to(device())
            self.engine, *_ = self._initialize(
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
        if not cell.offload:
            module.to(device())
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

    def train(self, steps: int, first: int = 0) -> list[float]:
        """Losses on this rank, one a step."""
        return [self.step(index) for index in range(first, first + steps)]

    def back(self) -> None:
        """To the weights before the last step, by another one of `ThereAndBack`."""
        ThereAndBack.is_back = True
        try:
            self.step()
        finally:
            ThereAndBack.is_back = False

    def rates(self) -> dict[str, float]:
        return tiny.learning_rates(self.module)

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
        mesh = init_device_mesh(
            device(), (2, world_size // 2), mesh_dim_names=("replicate", "shard")
        )
    else:
        mesh = init_device_mesh(device(), (world_size,))
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


def steps_from_here(training: Training, sections: Any, *step: Any, **arguments: Any) -> list[Any]:
    """For each section, or None, the facts of one and the same step of `ThereAndBack`."""
    rates, found = training.rates(), []
    for section in sections:
        training.plugin = None
        if section is not None:
            training.attach(section)
        before = training.snapshot()
        training.step(*step, **arguments)
        after = training.snapshot()
        facts = {
            "weights": before,
            "after": after,
            "gradients": {n: (before[n] - after[n]) / rate for n, rate in rates.items()},
            "rates": rates,
        }
        if training.plugin is not None:
            facts |= facts_of(training.plugin)
            training.plugin.detach()
            training.plugin = None
        training.back()
        found.append(facts)
    return found


def facts_of(plugin: Any) -> dict[str, Any]:
    """What a plugin tells of its graph, of the step and of who owns what."""
    engine, graph = plugin.engine, plugin.graph
    if hasattr(graph, "laplacian"):
        matrices = {"laplacian": graph.laplacian().toarray()}
    else:
        matrices = {"operators": {name: graph.operator(name) for name, _ in graph.held.graph_of}}
    return {
        "metrics": plugin.metrics(),
        "nodes": graph.num_nodes,
        "edges": graph.num_edges,
        **matrices,
        "lambda_max": graph.lambda_max,
        "owned": [(f.parameter, f.start, f.length) for f in engine.fragments],
        "sizes": {n: int(np.prod(s)) for n, s in engine.shapes.items()},
        "shard_ranks": engine.communicator.world_size,
    }


def one_step(
    cell: Any,
    sections: Any,
    accumulation: int = 1,
    clipping: float = 0.0,
    model: Any = tiny.TinyLlama,
) -> list[Any]:
    """`steps_from_here` of a new training of a cell."""
    training = Training(
        cell, None, ThereAndBack, accumulation=accumulation, clipping=clipping, model=model
    )
    found = steps_from_here(training, sections)
    training.close()
    return found


def weights_after(
    steps: int, name: str, section: Any, optimizer: Any = torch.optim.AdamW
) -> dict[str, np.ndarray]:
    """Weights after some steps at the rates of Adam."""
    training = Training(name, section, optimizer, tiny.ADAM_RATES)
    training.train(steps)
    weights = training.snapshot()
    training.close()
    return weights
