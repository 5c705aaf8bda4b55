"""DeepSpeed where every rank holds the full gradient: stage 0, and `BF16_Optimizer`.

`BF16_Optimizer` is what stage 1 uses for bf16 with float32 gradient accumulation; it takes its
norm from the full gradient, so all ranks must edit it alike.
"""

from typing import Any

import torch

from spectral_ds.engines.deepspeed import DeepSpeedEngine
from spectral_ds.sharding import Communicator, Fragment


class DeepSpeedReplicatedEngine(DeepSpeedEngine):
    """One fragment a parameter, the same on all ranks; every rank filters all of them alike."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine, engine.data_parallel_group)
        self.communicator = Communicator.alone(self.everyone.device)
        optimizer = self._optimizer
        # Low precision optimizers put float32 copies into their groups and keep the parameters.
        groups = (
            getattr(optimizer, "bf16_groups", None)
            or getattr(optimizer, "fp16_groups", None)
            or [group["params"] for group in optimizer.param_groups]
        )
        place_of = {id(p): (g, i) for g, group in enumerate(groups) for i, p in enumerate(group)}
        named = dict(engine.module.named_parameters())
        self.shapes = self._shapes_of(
            {id(p) for p in named.values() if p.requires_grad and id(p) in place_of}
        )
        self._parameters = [named[name] for name in self.shapes]
        # (parameter group, position in it) of each parameter.
        self._places = [place_of[id(parameter)] for parameter in self._parameters]
        self.fragments = [Fragment(n, 0, p.numel()) for n, p in named.items() if n in self.shapes]

    def gradients(self) -> list[torch.Tensor | None]:
        if hasattr(self._optimizer, "fp32_groups_gradients"):
            has_gradient = self._optimizer.fp32_groups_has_gradients
            values = self._optimizer.fp32_groups_gradients
            return [values[g][i].view(-1) if has_gradient[g][i] else None for g, i in self._places]
        return [None if p.grad is None else p.grad.view(-1) for p in self._parameters]

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().view(-1) for parameter in self._parameters]
