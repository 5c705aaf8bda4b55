"""DeepSpeed ZeRO stage 3: every parameter is cut into equal runs, one a rank."""

from typing import Any

import torch

from spectral_ds.engines.deepspeed import DeepSpeedEngine
from spectral_ds.sharding import Fragment


class DeepSpeedZero3Engine(DeepSpeedEngine):
    """Fragments of a `DeepSpeedZeroOptimizer_Stage3`."""

    def __init__(self, engine: Any) -> None:
        zero = engine.optimizer
        super().__init__(engine, zero.dp_process_group)
        self._is_offloaded = bool(zero.offload_optimizer)
        self._keeps_old_gradients = True
        # (sub-group, position in it, offset in its flat partition) of each fragment.
        self._places: list[tuple[int, int, int]] = []
        self.fragments: list[Fragment] = []
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
                    self._parameters.append(parameter)
                    self._places.append((sub_group, position, offset))
                    self.fragments.append(Fragment(self._name_of[id(parameter)], start, length))

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
