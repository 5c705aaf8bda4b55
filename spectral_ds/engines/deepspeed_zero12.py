"""DeepSpeed ZeRO stages 1 and 2: gradients live in flat partitions, one a parameter group.

On the device they are a list of views that tiles the partition; with CPU offload they are the
`.grad` of the float32 partition. Parameter groups are stepped one after the other; all are gathered
at the end.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from spectral_ds.engines.deepspeed import DeepSpeedEngine, PlacedFragment


@dataclass(frozen=True, eq=False)
class Zero12Fragment(PlacedFragment):
    """A run of this rank's partition of a group; `offset` counts in that.

    Attributes:
        position: of the parameter among those of the partition.
    """

    position: int


class DeepSpeedZero12Engine(DeepSpeedEngine[Zero12Fragment]):
    """Fragments of a `DeepSpeedZeroOptimizer`: the runs of parameters in this rank's partitions."""

    def __init__(self, engine: Any) -> None:
        zero = engine.optimizer
        super().__init__(engine, zero.real_dp_process_group[0])
        self._is_offloaded = bool(zero.cpu_offload)
        self._keeps_old_gradients = True  # on the device they are zeros instead
        self.shapes = self._shapes_of({id(p) for group in zero.bit16_groups for p in group})
        self._own(self._runs())

    def _runs(self) -> Iterator[Zero12Fragment]:
        """The runs of all parameters in this rank's partitions."""
        zero, rank = self._optimizer, self.communicator.rank
        for group, parameters in enumerate(zero.params_in_partition):
            partition_size = int(zero.partition_size[group])
            for position, parameter in enumerate(parameters):
                key = zero.get_param_id(parameter)
                start = int(zero.grad_start_offset[group][rank][key])
                offset = int(zero.grad_partition_insertion_offset[group][rank][key])
                length = min(parameter.numel() - start, partition_size - offset)
                if length > 0:
                    fragment = self._fragment(parameter, start, length)
                    yield Zero12Fragment(fragment, parameter, group, offset, position)

    def gradients(self) -> list[torch.Tensor | None]:
        if self._is_offloaded:
            # DeepSpeed itself waits in its step: a copy into pinned memory may be under way.
            getattr(self._optimizer, "_wait_for_offload_copies", lambda: None)()
            partitions = self._optimizer.single_partition_of_fp32_groups
            return [
                placed.part_of(partitions[placed.group].grad)
                if self._has_gradient(placed)
                else None
                for placed in self._placed
            ]
        averaged = self._averaged_gradients()
        found = [averaged[placed.group][placed.position].view(-1) for placed in self._placed]
        assert [len(gradient) for gradient in found] == [
            fragment.length for fragment in self.fragments
        ], "gradients do not tile the shard"
        return [
            gradient if self._has_gradient(placed) else None
            for gradient, placed in zip(found, self._placed, strict=True)
        ]

    def _averaged_gradients(self) -> list[list[torch.Tensor]]:
        """By group, the part of each parameter that has a part in the partition, in its order."""
        zero = self._optimizer
        # What belongs to no parameter is padding, also between parameters.
        return [
            [t for t in zero.averaged_gradients[group] if not getattr(t, "_zero_padding", False)]
            for group in range(len(zero.params_in_partition))
        ]

    def weights(self) -> list[torch.Tensor]:
        partitions = self._optimizer.single_partition_of_fp32_groups
        return [placed.part_of(partitions[placed.group].detach()) for placed in self._placed]

    def _call_after_update(self, after_update: Callable[[], None]) -> Any:
        groups = len(self._optimizer.bit16_groups)
        return self._call_after_last_group(after_update, groups, self._copy_to_low_precision)

    def _copy_to_low_precision(self, group: int) -> None:
        zero = self._optimizer
        partition = zero.parallel_partitioned_bit16_groups[group][self.communicator.rank]
        partition.data.copy_(zero.single_partition_of_fp32_groups[group].data)
