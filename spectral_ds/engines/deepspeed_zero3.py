"""DeepSpeed ZeRO stage 3: every parameter is cut into equal runs, one a rank.

Sub-groups of parameters are stepped one after the other; small parameters, which stay whole on
every rank, are gathered at the end.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from spectral_ds.engines.deepspeed import DeepSpeedEngine, PlacedFragment
from spectral_ds.engines.hooks import require_method

COPY_TO_LOW_PRECISION = "_reassign_or_swap_out_partitioned_parameters"


@dataclass(frozen=True, eq=False)
class Zero3Fragment(PlacedFragment):
    """This rank's run of a parameter; `offset` counts in the float32 partition of its sub-group.

    Attributes:
        sub_group: index of the sub-group.
        position: of the parameter in its sub-group.
    """

    sub_group: int
    position: int


class DeepSpeedZero3Engine(DeepSpeedEngine[Zero3Fragment]):
    """Fragments of a `DeepSpeedZeroOptimizer_Stage3`, at most one a parameter."""

    def __init__(self, engine: Any) -> None:
        zero = engine.optimizer
        super().__init__(engine, zero.dp_process_group)
        self._is_offloaded = bool(zero.offload_optimizer)
        self._keeps_old_gradients = True
        self.shapes = self._shapes_of(
            {id(p) for group in zero.fp16_groups for p in group if p.requires_grad}
        )
        self._own(self._runs())

    def _runs(self) -> Iterator[Zero3Fragment]:
        """This rank's runs of all trainable parameters."""
        zero, rank = self._optimizer, self.communicator.rank
        for sub_group, parameters in enumerate(zero.fp16_groups):
            group = zero.sub_group_to_group_id[sub_group]
            for position, parameter in enumerate(parameters):
                start = parameter.partition_numel() * rank
                length = min(parameter.partition_numel(), parameter.ds_numel - start)
                if length > 0 and parameter.requires_grad:
                    fragment = self._fragment(parameter, start, length)
                    offset = zero.grad_position[zero.get_param_id(parameter)][1]
                    yield Zero3Fragment(fragment, parameter, group, offset, sub_group, position)

    def gradients(self) -> list[torch.Tensor | None]:
        return [
            self._gradient(placed) if self._has_gradient(placed) else None
            for placed in self._placed
        ]

    def _gradient(self, placed: Zero3Fragment) -> torch.Tensor:
        zero = self._optimizer
        if self._is_offloaded:
            return placed.part_of(zero.fp32_partitioned_groups_flat[placed.sub_group].grad)
        averaged: torch.Tensor = zero.averaged_gradients[placed.sub_group][placed.position]
        return averaged.view(-1).narrow(0, 0, placed.fragment.length)  # the rest is padding

    def weights(self) -> list[torch.Tensor]:
        partitions = self._optimizer.fp32_partitioned_groups_flat
        return [placed.part_of(partitions[placed.sub_group].detach()) for placed in self._placed]

    def _call_after_update(self, after_update: Callable[[], None]) -> Any:
        zero = self._optimizer
        require_method(zero, COPY_TO_LOW_PRECISION)
        copy = getattr(zero, COPY_TO_LOW_PRECISION)
        return self._call_after_last_group(after_update, len(zero.fp16_groups), copy)
