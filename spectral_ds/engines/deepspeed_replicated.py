"""DeepSpeed stage 0: every rank holds the full gradient and the full weights.

In float32 the optimizer is torch's own. In bfloat16 DeepSpeed wraps it and keeps float32 weights:
`FP16_UnfusedOptimizer` one tensor a parameter, `FP16_Optimizer` one flat tensor a parameter group.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from spectral_ds.engines.base import UnsupportedEngineError
from spectral_ds.engines.deepspeed import DeepSpeedEngine, PlacedFragment
from spectral_ds.engines.hooks import after_step_of
from spectral_ds.engines.views import (
    flat_view,
    plain_gradient,
    refuse_without_view,
    sparse_among,
)
from spectral_ds.sharding import Communicator


@dataclass(frozen=True, eq=False)
class ReplicatedFragment(PlacedFragment):
    """A whole parameter; `offset` counts in the flat tensor of its group, where there is one.

    Attributes:
        position: of the parameter in its group.
    """

    position: int


class DeepSpeedReplicatedEngine(DeepSpeedEngine[ReplicatedFragment]):
    """One fragment a parameter, the same on all ranks; every rank filters all of them alike."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine, engine.data_parallel_group)
        self.communicator = Communicator.alone(self.everyone.device)
        placed = {id(each.parameter): each for each in self._parameters()}
        self.shapes = self._shapes_of(
            {id(p) for p in self.named.values() if p.requires_grad and id(p) in placed}
        )
        self._own(placed[id(self.named[name])] for name in self.shapes)
        refuse_without_view({name: self.named[name] for name in self.shapes})

    def _parameters(self) -> Iterator[ReplicatedFragment]:
        """All parameters of the model that the optimizer has, in its order."""
        # Low precision optimizers put float32 copies into their groups and keep the parameters.
        groups = getattr(self._optimizer, "fp16_groups", None) or [
            group["params"] for group in self._optimizer.param_groups
        ]
        for group, parameters in enumerate(groups):
            offset = 0
            for position, parameter in enumerate(parameters):
                if id(parameter) in self._name_of:
                    fragment = self._fragment(parameter, 0, parameter.numel())
                    yield ReplicatedFragment(fragment, parameter, group, offset, position)
                offset += parameter.numel()

    def gradients(self) -> list[torch.Tensor | None]:
        gradients = [plain_gradient(placed.parameter) for placed in self._placed]
        return [None if gradient is None else flat_view(gradient) for gradient in gradients]

    def sparse_gradients(self) -> frozenset[str]:
        return sparse_among(
            {placed.fragment.parameter: placed.parameter for placed in self._placed}
        )

    def weights(self) -> list[torch.Tensor]:
        optimizer = self._optimizer
        if hasattr(optimizer, "fp32_groups"):
            copies = optimizer.fp32_groups
            return [copies[p.group][p.position].detach().view(-1) for p in self._placed]
        if hasattr(optimizer, "fp32_groups_flat"):
            flat = optimizer.fp32_groups_flat
            return [placed.part_of(flat[placed.group].detach()) for placed in self._placed]
        return [placed.parameter.detach().view(-1) for placed in self._placed]

    def _call_after_update(self, after_update: Callable[[], None]) -> Any:
        if getattr(self._optimizer, "fused_adam_legacy", False):
            raise UnsupportedEngineError(
                "spectral_ds does not support acting on updates with optimizer.legacy_fusion, "
                "where the optimizer itself makes the low precision copies; set it to false"
            )
        return after_step_of(self._engine.basic_optimizer, after_update)
