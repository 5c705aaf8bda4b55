"""What of DeepSpeed is not supported, and the way out."""

from typing import Any

from spectral_ds.engines.base import UnsupportedEngineError
from spectral_ds.engines.deepspeed import HOOKED
from spectral_ds.engines.hooks import require_method


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
        "sequence parallelism by a device mesh (sequence_parallel_size in the config, or "
        "mesh_param), where DeepSpeed does not average gradients over the ranks that share a "
        "sequence; give initialize an mpu, such as deepspeed.runtime.sequence_parallel."
        "parallel_state_sp": engine.sequence_parallel_size > 1 and engine.mesh_device is not None,
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
        "managed_gradient_accumulation: false, where each step may be of another number of "
        "micro-batches; set it to true": not getattr(config, "managed_gradient_accumulation", True),
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
    require_method(engine, HOOKED)
