"""What all DeepSpeed engines share: the hook, the step, the monitor, what is refused.

The hook wraps `engine._take_model_step`: it runs only at the accumulation boundary, before
overflow check, norm and clipping. (An optimizer pre-step hook would come after clipping, and
once per parameter group.)
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from spectral_ds.engines.base import Engine, UnsupportedEngineError
from spectral_ds.engines.used import UsedParameters
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
        # One parameter a fragment; set by the subclass.
        self._parameters: list[torch.nn.Parameter] = []
        # DeepSpeed keeps the float32 gradient on the CPU, and norms that it took during backward.
        self._is_offloaded = False
        # The gradient of a parameter that a step does not use is that of an earlier step.
        self._keeps_old_gradients = False
        self._used: UsedParameters | None = None
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

    @property
    def skipped_steps(self) -> int:
        return int(self._engine.skipped_steps)

    def _has_gradient(self, parameter: torch.nn.Parameter) -> bool:
        """Whether the parameter got a gradient since the last step."""
        return self._used is None or parameter in self._used

    def gradients_changed(self) -> None:
        if self._is_offloaded:
            norms = self._optimizer.norm_for_param_grads
            for parameter, gradient in zip(self._parameters, self.gradients(), strict=True):
                if gradient is not None:
                    norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
                    norms[self._optimizer.get_param_id(parameter)] = norm
        if self._used is not None:
            self._used.clear()

    def install(self, before_step: Callable[[], None]) -> None:
        original = getattr(self._engine, HOOKED)
        self._previous = self._engine.__dict__.get(HOOKED)

        @functools.wraps(original)
        def take_model_step(*args: Any, **kwargs: Any) -> Any:
            if self._hook is take_model_step:
                before_step()
            return original(*args, **kwargs)

        if self._keeps_old_gradients:
            self._used = UsedParameters(self._parameters)
        self._hook = take_model_step
        setattr(self._engine, HOOKED, take_model_step)

    def remove(self) -> None:
        hook, self._hook = self._hook, None
        if self._used is not None:
            self._used.remove()
        # If somebody wrapped our wrapper, it stays in their chain and only passes calls on.
        if self._engine.__dict__.get(HOOKED) is hook:
            if self._previous is None:
                delattr(self._engine, HOOKED)
            else:
                setattr(self._engine, HOOKED, self._previous)

    def log(self, message: str, level: int = logging.INFO) -> None:
        from deepspeed.utils import log_dist

        log_dist(message, ranks=[0], level=level)

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
