"""DeepSpeed ZeRO stages 1 and 2: gradients live in flat partitions, one a parameter group.

On the device they are a list of views that tiles the partition; with CPU offload they are the
`.grad` of the float32 partition. Parameter groups are stepped one after the other; all are gathered
at the end.
"""

from collections.abc import Callable
from typing import Any

import torch

from spectral_ds.engines.deepspeed import DeepSpeedEngine


class DeepSpeedZero12Engine(DeepSpeedEngine):
    """Fragments of a `DeepSpeedZeroOptimizer`; their places are (parameter group, offset in it)."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine, engine.optimizer.real_dp_process_group[0])
        zero = self._optimizer
        self._is_offloaded = bool(zero.cpu_offload)
        self._keeps_old_gradients = True  # on the device they are zeros instead
        self.shapes = self._shapes_of({id(p) for group in zero.bit16_groups for p in group})
        for group, parameters in enumerate(zero.params_in_partition):
            self._add_fragments(group, parameters)

    def _add_fragments(self, group: int, parameters: list[torch.nn.Parameter]) -> None:
        """The runs of these parameters in this rank's partition of one parameter group."""
        zero, rank = self._optimizer, self.communicator.rank
        partition_size = int(zero.partition_size[group])
        for parameter in parameters:
            key = zero.get_param_id(parameter)
            start = int(zero.grad_start_offset[group][rank][key])
            offset = int(zero.grad_partition_insertion_offset[group][rank][key])
            length = min(parameter.numel() - start, partition_size - offset)
            if length > 0:
                self._add_fragment(parameter, start, length, group, (group, offset))

    def gradients(self) -> list[torch.Tensor | None]:
        zero = self._optimizer
        if self._is_offloaded:
            return self._offloaded_gradients()
        # DeepSpeed's list follows `params_in_partition`; what belongs to no parameter is padding.
        tensors = [
            tensor.view(-1)
            for group, parameters in enumerate(zero.params_in_partition)
            for tensor, _ in zip(
                (
                    tensor
                    for tensor in zero.averaged_gradients[group]
                    if not getattr(tensor, "_zero_padding", False)
                ),
                parameters,
                strict=False,
            )
            if tensor.numel() > 0
        ]
        assert [tensor.numel() for tensor in tensors] == [
            fragment.length for fragment in self.fragments
        ], "gradients do not tile the shard"
        return [
            tensor if self._has_gradient(parameter) else None
            for tensor, parameter in zip(tensors, self._parameters, strict=True)
        ]

    def _offloaded_gradients(self) -> list[torch.Tensor | None]:
        partitions = self._optimizer.single_partition_of_fp32_groups
        return [
            partitions[group].grad.view(-1).narrow(0, offset, fragment.length)
            if self._has_gradient(parameter)
            else None
            for (group, offset), fragment, parameter in zip(
                self._places, self.fragments, self._parameters, strict=True
            )
        ]

    def weights(self) -> list[torch.Tensor]:
        partitions = self._optimizer.single_partition_of_fp32_groups
        return [
            partitions[group].detach().view(-1).narrow(0, offset, fragment.length)
            for (group, offset), fragment in zip(self._places, self.fragments, strict=True)
        ]

    def _call_after_update(self, after_update: Callable[[], None]) -> Any:
        groups = len(self._optimizer.bit16_groups)
        return self._call_after_last_group(after_update, groups, self._copy_to_low_precision)

    def _copy_to_low_precision(self, group: int) -> None:
        zero = self._optimizer
        partition = zero.parallel_partitioned_bit16_groups[group][self.communicator.rank]
        partition.data.copy_(zero.single_partition_of_fp32_groups[group].data)
