"""DeepSpeed's `BF16_Optimizer`: stage 1 in bfloat16 with float32 gradient accumulation.

Float32 weights are flat partitions, one a parameter group and rank. Gradients are whole on every
rank; a rank steps on its part of them, but takes the norm of the whole without a reduction.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from spectral_ds.engines.deepspeed import DeepSpeedEngine
from spectral_ds.engines.hooks import after_step_of


class DeepSpeedBF16Engine(DeepSpeedEngine):
    """Fragments are the runs of parameters in this rank's partitions.

    Their places are (parameter group, position in it, offset in the partition).
    """

    def __init__(self, engine: Any) -> None:
        optimizer = engine.optimizer
        super().__init__(engine, optimizer.dp_process_group)
        self.shapes = self._shapes_of({id(p) for group in optimizer.bf16_groups for p in group})
        for group, parameters in enumerate(optimizer.bf16_groups):
            partition_size = optimizer.fp32_groups_flat_partition[group].numel()
            first = self.communicator.rank * partition_size
            begin = 0  # of the parameter in the group
            for position, parameter in enumerate(parameters):
                start = max(first - begin, 0)
                length = min(first + partition_size - begin, parameter.numel()) - start
                if length > 0:
                    place = (group, position, begin + start - first)
                    self._add_fragment(parameter, start, length, group, place)
                begin += parameter.numel()

    def gradients(self) -> list[torch.Tensor | None]:
        values = self._optimizer.fp32_groups_gradients
        has_gradient = self._optimizer.fp32_groups_has_gradients
        return [
            values[group][position].view(-1).narrow(0, fragment.start, fragment.length)
            if has_gradient[group][position]
            else None
            for (group, position, _), fragment in zip(self._places, self.fragments, strict=True)
        ]

    def gradients_changed(self) -> None:
        """Gather what the other ranks edited, so that every rank takes the same norm."""
        optimizer = self._optimizer
        for whole, own in zip(
            optimizer.fp32_groups_gradients_flat,
            optimizer.fp32_groups_gradient_flat_partition,
            strict=True,
        ):
            dist.all_gather_into_tensor(whole, own, group=self.communicator.group)

    def weights(self) -> list[torch.Tensor]:
        partitions = self._optimizer.fp32_groups_flat_partition
        return [
            partitions[group].detach().narrow(0, offset, fragment.length)
            for (group, _, offset), fragment in zip(self._places, self.fragments, strict=True)
        ]

    def _call_after_update(self, after_update: Callable[[], None]) -> Any:
        return after_step_of(self._engine.basic_optimizer, after_update)
