"""DeepSpeed's `BF16_Optimizer`: stage 1 in bfloat16 with float32 gradient accumulation.

Float32 weights are flat partitions, one a parameter group and rank. Gradients are whole on every
rank; a rank steps on its part of them, but takes the norm of the whole without a reduction.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from spectral_ds.engines.deepspeed import DeepSpeedEngine, PlacedFragment
from spectral_ds.engines.hooks import after_step_of


@dataclass(frozen=True, eq=False)
class BF16Fragment(PlacedFragment):
    """A run of a group's float32 partition; `offset` counts in that.

    Attributes:
        position: of the parameter in its group.
    """

    position: int

    def run_of(self, whole: torch.Tensor) -> torch.Tensor:
        """The view of the fragment in a tensor of the whole parameter."""
        return whole.view(-1).narrow(0, self.fragment.start, self.fragment.length)


class DeepSpeedBF16Engine(DeepSpeedEngine[BF16Fragment]):
    """Fragments are the runs of parameters in this rank's partitions."""

    def __init__(self, engine: Any) -> None:
        optimizer = engine.optimizer
        super().__init__(engine, optimizer.dp_process_group)
        self.shapes = self._shapes_of({id(p) for group in optimizer.bf16_groups for p in group})
        self._own(self._runs())

    def _runs(self) -> Iterator[BF16Fragment]:
        """The runs of all parameters in this rank's partitions."""
        for group, parameters in enumerate(self._optimizer.bf16_groups):
            partition_size = self._optimizer.fp32_groups_flat_partition[group].numel()
            first = self.communicator.rank * partition_size
            begin = 0  # of the parameter in the group
            for position, parameter in enumerate(parameters):
                start = max(first - begin, 0)
                length = min(first + partition_size - begin, parameter.numel()) - start
                if length > 0:
                    fragment = self._fragment(parameter, start, length)
                    offset = begin + start - first
                    yield BF16Fragment(fragment, parameter, group, offset, position)
                begin += parameter.numel()

    def gradients(self) -> list[torch.Tensor | None]:
        optimizer = self._optimizer
        return [
            placed.run_of(optimizer.fp32_groups_gradients[placed.group][placed.position])
            if optimizer.fp32_groups_has_gradients[placed.group][placed.position]
            else None
            for placed in self._placed
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
        return [placed.part_of(partitions[placed.group].detach()) for placed in self._placed]

    def _call_after_update(self, after_update: Callable[[], None]) -> Any:
        return after_step_of(self._engine.basic_optimizer, after_update)
