"""Where sharded gradients live: one file per engine. Knows fragments, no graph.

A new engine is a subclass of `Engine` (base.py) in a file of its own, and a line in `engine_for`.
It sets `module`, `optimizer`, `communicator`, `everyone`, `shapes`, `named`, `fragments` and
`holders`; returns flat views of this
rank's gradients and weights, and learning rates, in the order of the fragments; tells its `step`
and `config_section`; and calls the hooks of `install` at each optimizer step, until `remove`.
Everything else has a default. Nothing above this folder changes. README.md has more.
"""

import sys
from typing import Any

import torch

from spectral_ds.engines.base import Engine, NothingToFilterError, UnsupportedEngineError
from spectral_ds.engines.wrappers import layers_of

__all__ = ["Engine", "NothingToFilterError", "UnsupportedEngineError", "engine_for"]


def engine_for(model_or_engine: Any, optimizer: torch.optim.Optimizer | None = None) -> Engine:
    """The adapter for what the user trains with.

    Raises:
        UnsupportedEngineError: it is none of the supported engines, or uses a feature of one
            that is not supported; says which, and the way out.
        NothingToFilterError: it is a DeepSpeed engine that trains no parameter.
    """
    deepspeed = sys.modules.get("deepspeed")  # who has not imported it has no engine of it
    if deepspeed is not None and isinstance(model_or_engine, deepspeed.DeepSpeedEngine):
        own = set(map(id, layers_of(getattr(model_or_engine, "optimizer", None))))
        if optimizer is not None and own.isdisjoint(map(id, layers_of(optimizer))):
            raise UnsupportedEngineError(
                "optimizer: a DeepSpeed engine brings its own; leave the argument out"
            )
        if getattr(model_or_engine, "basic_optimizer", None) is None:
            raise NothingToFilterError("the DeepSpeed engine has no optimizer")
        adapter = _deepspeed_engine_for(model_or_engine)
        if not adapter.shapes:
            raise NothingToFilterError("the DeepSpeed engine's optimizer trains no parameter")
        return adapter
    if not isinstance(model_or_engine, torch.nn.Module):
        raise UnsupportedEngineError(
            f"cannot attach to {type(model_or_engine).__name__}: neither a DeepSpeed engine nor a "
            "torch module"
        )
    if optimizer is None:
        raise UnsupportedEngineError("optimizer: a torch module needs the optimizer that trains it")
    from spectral_ds.engines.fsdp2 import FSDP2Engine
    from spectral_ds.engines.torch_engine import TorchEngine

    kind = FSDP2Engine if FSDP2Engine.recognizes(model_or_engine) else TorchEngine
    return kind(model_or_engine, optimizer)


def _deepspeed_engine_for(engine: Any) -> Engine:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    from spectral_ds.engines.deepspeed_bf16 import DeepSpeedBF16Engine
    from spectral_ds.engines.deepspeed_refusals import refuse_unsupported
    from spectral_ds.engines.deepspeed_replicated import DeepSpeedReplicatedEngine
    from spectral_ds.engines.deepspeed_zero3 import DeepSpeedZero3Engine
    from spectral_ds.engines.deepspeed_zero12 import DeepSpeedZero12Engine

    refuse_unsupported(engine)
    kind = type(engine.optimizer)
    if kind is DeepSpeedZeroOptimizer:
        return DeepSpeedZero12Engine(engine)
    if kind is DeepSpeedZeroOptimizer_Stage3:
        return DeepSpeedZero3Engine(engine)
    if kind is BF16_Optimizer:
        return DeepSpeedBF16Engine(engine)
    if engine.zero_optimization_stage() == 0:
        return DeepSpeedReplicatedEngine(engine)
    raise UnsupportedEngineError(f"spectral_ds does not support DeepSpeed's {kind.__name__}")
