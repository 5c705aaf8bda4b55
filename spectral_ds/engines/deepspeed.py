"""What all DeepSpeed engines share: the hook, the step, the monitor, what is refused.

The hook wraps `engine._take_model_step`: it runs only at the accumulation boundary, before
overflow check, norm and clipping. (An optimizer pre-step hook would come after clipping, and
once per parameter group.)
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from spectral_ds.engines.base import Engine, UnsupportedEngineError
from spectral_ds.sharding import Communicator

HOOKED = "_take_model_step"


class DeepSpeedEngine(Engine):
    """Base of the adapters for a `deepspeed.DeepSpeedEngine`; a subclass says where gradients live.

    Args:
        engine: the user's engine.
        group: the ranks over which its parameters are sharded or replicated.
    """

    def __init__(self, engine: Any, group: Any) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        self._hook: Callable[..., Any] | None = None
        self.holders = (engine, engine.module)
        self.everyone = Communicator(group, torch.device(engine.device))
        self.communicator = self.everyone
        self._name_of = {id(p): name for name, p in engine.module.named_parameters()}

    def _shapes_of(self, trained: set[int]) -> dict[str, tuple[int, ...]]:
        """Full shapes of the parameters with these ids, in model order."""
        return {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self._engine.module.named_parameters()
            if id(parameter) in trained and getattr(parameter, "ds_numel", parameter.numel()) > 0
        }

    @property
    def config_section(self) -> Any:
        return self._engine.config.get("spectral_ds")

    @property
    def step(self) -> int:
        return int(self._engine.global_steps)

    def install(self, before_step: Callable[[], None]) -> None:
        original = getattr(self._engine, HOOKED)
        self._previous = self._engine.__dict__.get(HOOKED)

        @functools.wraps(original)
        def take_model_step(*args: Any, **kwargs: Any) -> Any:
            if self._hook is take_model_step:
                before_step()
            return original(*args, **kwargs)

        self._hook = take_model_step
        setattr(self._engine, HOOKED, take_model_step)

    def remove(self) -> None:
        hook, self._hook = self._hook, None
        # If somebody wrapped our wrapper, it stays in their chain and only passes calls on.
        if self._engine.__dict__.get(HOOKED) is hook:
            if self._previous is None:
                delattr(self._engine, HOOKED)
            else:
                setattr(self._engine, HOOKED, self._previous)

    def log(self, message: str) -> None:
        from deepspeed.utils import log_dist

        log_dist(message, ranks=[0])

    def write(self, metrics: Mapping[str, float]) -> None:
        monitor = self._engine.monitor
        if monitor.enabled:
            # Where DeepSpeed puts its own scalars of this step, after having counted its samples.
            samples = self._engine.global_samples + self._engine.train_batch_size()
            monitor.write_events(
                [(f"spectral_ds/{name}", value, samples) for name, value in metrics.items()]
            )


def refuse_unsupported(engine: Any) -> None:
    """Raise UnsupportedEngineError for the first thing in use that is not supported."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    config = engine._config
    zero = config.zero_config
    devices = {
        str(getattr(getattr(zero, key, None), "device", None)).rpartition(".")[2]
        for key in ("offload_optimizer", "offload_param")
    }
    reasons = {
        "pipeline parallelism": isinstance(engine, PipelineEngine),
        "mixture-of-experts layers": engine.has_moe_layers,
        "tensor or model parallelism": engine.mp_world_size > 1,
        "ZenFlow; remove zero_optimization.zenflow": bool(engine.zenflow),
        "SuperOffload; remove zero_optimization.offload_optimizer.super_offload": (
            engine.super_offload()
        ),
        "NVMe swapping; set the offload device to cpu": "nvme" in devices,
        "MiCS; remove zero_optimization.mics_shard_size": getattr(zero, "mics_shard_size", -1) > 0,
        "hpZ; remove zero_optimization.zero_hpz_partition_size": (
            getattr(zero, "zero_hpz_partition_size", 1) > 1
        ),
        "DeepCompile; set compile.deepcompile to false": getattr(
            getattr(config, "compile_config", None), "deepcompile", False
        ),
        "DeepSpeed's Muon optimizer, which runs inside the step": "muon"
        in type(engine.basic_optimizer).__name__.lower(),
        "fp16 in ZeRO stage 0, where DeepSpeed divides the gradient by a loss scale that it never "
        "applied; use stage 1, 2 or 3, or bf16": (
            engine.fp16_enabled() and engine.zero_optimization_stage() == 0
        ),
    }
    for reason, in_use in reasons.items():
        if in_use:
            raise UnsupportedEngineError(f"spectral_ds does not support {reason}")
    if not hasattr(engine, HOOKED):
        raise UnsupportedEngineError(
            f"this DeepSpeed version has no DeepSpeedEngine.{HOOKED}, which spectral_ds wraps; "
            "use DeepSpeed 0.19"
        )
