"""DeepSpeed stage 0: every rank holds the full gradient and the full weights.

In float32 the optimizer is torch's own. In bfloat16 DeepSpeed wraps it and keeps float32 weights:
`FP16_UnfusedOptimizer` one tensor a parameter, `FP16_Optimizer` one flat tensor a parameter group.
"""

from collections.abc import Callable
from typing import Any

import torch

from spectral_ds.engines.base import UnsupportedEngineError
from spectral_ds.engines.deepspeed import DeepSpeedEngine
from spectral_ds.engines.hooks import after_step_of
from spectral_ds.sharding import Communicator


class DeepSpeedReplicatedEngine(DeepSpeedEngine):
    """One fragment a parameter, the same on all ranks; every rank filters all of them alike.

    Their places are (parameter group, position in it, elements before it in the group).
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine, engine.data_parallel_group)
        self.communicator = Communicator.alone(self.everyone.device)
        optimizer = self._optimizer
        # Low precision optimizers put float32 copies into their groups and keep the parameters.
        groups = getattr(optimizer, "fp16_groups", None) or [
            group["params"] for group in optimizer.param_groups
        ]
        place_of: dict[int, tuple[int, int, int]] = {}
        for group, parameters in enumerate(groups):
            offset = 0
            for position, parameter in enumerate(parameters):
                place_of[id(parameter)] = (group, position, offset)
                offset += parameter.numel()
        named = self._named
        self.shapes = self._shapes_of(
            {id(p) for p in named.values() if p.requires_grad and id(p) in place_of}
        )
        for name in self.shapes:
            place = place_of[id(named[name])]
            self._add_fragment(named[name], 0, named[name].numel(), place[0], place)

    def gradients(self) -> list[torch.Tensor | None]:
        return [None if p.grad is None else p.grad.view(-1) for p in self._parameters]

    def weights(self) -> list[torch.Tensor]:
        optimizer = self._optimizer
        if hasattr(optimizer, "fp32_groups"):
            return [optimizer.fp32_groups[g][i].detach().view(-1) for g, i, _ in self._places]
        if hasattr(optimizer, "fp32_groups_flat"):
            return [
                optimizer.fp32_groups_flat[group].detach().narrow(0, offset, fragment.length)
                for (group, _, offset), fragment in zip(self._places, self.fragments, strict=True)
            ]
        return [parameter.detach().view(-1) for parameter in self._parameters]

    def _call_after_update(self, after_update: Callable[[], None]) -> Any:
        if getattr(self._optimizer, "fused_adam_legacy", False):
            raise UnsupportedEngineError(
                "spectral_ds does not support acting on updates with optimizer.legacy_fusion, "
                "where the optimizer itself makes the low precision copies; set it to false"
            )
        return after_step_of(self._engine.basic_optimizer, after_update)
