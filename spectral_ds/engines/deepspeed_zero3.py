"""DeepSpeed ZeRO stage 3: every parameter is cut into equal runs, one a rank.

Sub-groups of parameters are stepped one after the other; small parameters, which stay whole on
every rank, are gathered at the end.
"""

from collections.abc import Callable
from typing import Any

import torch

from spectral_ds.engines.deepspeed import DeepSpeedEngine
from spectral_ds.engines.hooks import require_method

COPY_TO_LOW_PRECISION = "_reassign_or_swap_out_partitioned_parameters"


class DeepSpeedZero3Engine(DeepSpeedEngine):
    """Fragments of a `DeepSpeedZeroOptimizer_Stage3`.

    Their places are (sub-group, position in it, offset in its flat partition).
    """

    def __init__(self, engine: Any) -> None:
        zero = engine.optimizer
        super().__init__(engine, zero.dp_process_group)
        self._is_offloaded = bool(zero.offload_optimizer)
        self._keeps_old_gradients = True
        self.shapes = self._shapes_of(
            {id(p) for group in zero.fp16_groups for p in group if p.requires_grad}
        )
        rank = self.communicator.rank
        for sub_group, parameters in enumerate(zero.fp16_groups):
            for position, parameter in enumerate(parameters):
                start = parameter.partition_numel() * rank
                length = min(parameter.partition_numel(), parameter.ds_numel - start)
                if length > 0 and parameter.requires_grad:
                    offset = zero.grad_position[zero.get_param_id(parameter)][1]
                    group = zero.sub_group_to_group_id[sub_group]
                    place = (sub_group, position, offset)
                    self._add_fragment(parameter, start, length, group, place)

    def gradients(self) -> list[torch.Tensor | None]:
        zero = self._optimizer
        found: list[torch.Tensor | None] = []
        for (sub_group, position, offset), fragment, parameter in zip(
            self._places, self.fragments, self._parameters, strict=True
        ):
            if not self._has_gradient(parameter):
                found.append(None)
            elif self._is_offloaded:
                partition = zero.fp32_partitioned_groups_flat[sub_group].grad
                found.append(partition.view(-1).narrow(0, offset, fragment.length))
            else:
                gradient = zero.averaged_gradients[sub_group][position]
                found.append(gradient.view(-1).narrow(0, 0, fragment.length))
        return found

    def weights(self) -> list[torch.Tensor]:
        partitions = self._optimizer.fp32_partitioned_groups_flat
        return [
            partitions[sub_group].detach().view(-1).narrow(0, offset, fragment.length)
            for (sub_group, _, offset), fragment in zip(self._places, self.fragments, strict=True)
        ]

    def _call_after_update(self, after_update: Callable[[], None]) -> Any:
        zero = self._optimizer
        require_method(zero, COPY_TO_LOW_PRECISION)
        copy = getattr(zero, COPY_TO_LOW_PRECISION)
        return self._call_after_last_group(after_update, len(zero.fp16_groups), copy)
