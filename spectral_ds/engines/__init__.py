"""Where sharded gradients live: one file per engine. Knows fragments, no graph."""

from typing import Any

import torch

from spectral_ds.engines.base import Engine, UnsupportedEngineError
from spectral_ds.engines.deepspeed import DeepSpeedZeroEngine

__all__ = ["DeepSpeedZeroEngine", "Engine", "UnsupportedEngineError", "engine_for"]


def engine_for(model_or_engine: Any, optimizer: torch.optim.Optimizer | None = None) -> Engine:
    """The adapter for what the user trains with.

    Raises:
        UnsupportedEngineError: it is none of the supported engines, or uses a feature of one
            that is not supported; says which, and the way out.
    """
    if DeepSpeedZeroEngine.recognizes(model_or_engine):
        if optimizer is not None and optimizer is not model_or_engine.optimizer:
            raise UnsupportedEngineError(
                "optimizer: a DeepSpeed engine brings its own optimizer; leave the argument out"
            )
        return DeepSpeedZeroEngine(model_or_engine)
    raise UnsupportedEngineError(
        f"cannot attach to {type(model_or_engine).__name__}: only a DeepSpeed engine with ZeRO "
        "stage 1 or 2 is supported in this version"
    )
