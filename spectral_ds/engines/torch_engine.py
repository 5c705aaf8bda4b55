"""A plain torch module or DDP with a torch optimizer: every rank holds the full gradient.

The hooks are the optimizer's own around its step, so the first runs once a step, after whatever the
training loop does between backward and `step()`. A loop that clips calls
`plugin.filter_gradients()` before. `FSDP2Engine` differs in who owns what only.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from spectral_ds.engines.base import (
    Engine,
    UnsupportedEngineError,
    canonical_name,
    learning_rate_of,
)
from spectral_ds.engines.hooks import after_step_of, before_step_of
from spectral_ds.engines.views import (
    flat_view,
    plain_gradient,
    real_shape,
    refuse_without_view,
    sparse_among,
)
from spectral_ds.sharding import Communicator, Fragment


class TorchEngine(Engine):
    """One fragment a parameter, the same on all ranks; every rank filters all of them alike.

    Args:
        model: a module, or one in DistributedDataParallel; may be compiled.
        optimizer: the optimizer that trains it.

    Raises:
        UnsupportedEngineError: FSDP1 is in use, or the optimizer trains none of the parameters.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        module = unwrapped(model)
        _refuse_fsdp1(module)
        self._optimizer = optimizer
        self._step = 0
        self._handles: list[Any] = []
        self.holders = (model, module, optimizer)
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = {
            canonical_name(name): parameter
            for name, parameter in module.named_parameters()
            if id(parameter) in trained and parameter.requires_grad and parameter.numel() > 0
        }
        if not named:
            raise UnsupportedEngineError("optimizer: it trains no parameter of the model")
        refuse_without_view(named)
        # One fragment each, in this order.
        self._parameters = self.named = named
        self.shapes = {name: real_shape(parameter) for name, parameter in named.items()}
        self._find_shards()

    def _find_shards(self) -> None:
        """Set `communicator`, `everyone`, `fragments` and `tensors`."""
        device = next(iter(self._parameters.values())).device
        self.everyone = Communicator(None, device)
        self.communicator = Communicator.alone(device)
        self.fragments = [Fragment(name, 0, math.prod(s)) for name, s in self.shapes.items()]
        self.tensors = WholeTensors(self.shapes)

    def _local(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a parameter or gradient, flat."""
        return flat_view(tensor)

    @property
    def config_section(self) -> Any:
        return None

    @property
    def step(self) -> int:
        return self._step

    @property
    def loss_scale(self) -> float:
        # Set inside a step that leaves it to a fused optimizer to divide by torch.amp's scale.
        scale = getattr(self._optimizer, "grad_scale", None)
        return 1.0 if scale is None else float(scale)

    def learning_rates(self) -> list[float]:
        groups = self._optimizer.param_groups
        group_of = {id(parameter): group for group in groups for parameter in group["params"]}
        return [learning_rate_of(group_of[id(p)]) for p in self._parameters.values()]

    def gradients(self) -> list[torch.Tensor | None]:
        gradients = [plain_gradient(parameter) for parameter in self._parameters.values()]
        return [None if gradient is None else self._local(gradient) for gradient in gradients]

    def sparse_gradients(self) -> frozenset[str]:
        return sparse_among(self._parameters)

    def weights(self) -> list[torch.Tensor]:
        return [self._local(parameter.detach()) for parameter in self._parameters.values()]

    def install(
        self, before_step: Callable[[], None], after_update: Callable[[], None] | None = None
    ) -> None:
        self._handles = []
        if after_update is not None:
            self._handles = self._call_unless_skipped(after_update)
        self._handles += [
            before_step_of(self._optimizer, before_step),
            after_step_of(self._optimizer, self._count_step),
        ]

    def _call_unless_skipped(self, after_update: Callable[[], None]) -> list[Any]:
        """Call it after each step, but those that torch.amp has a fused optimizer skip.

        torch.amp calls the step of a fused optimizer in any case, and tells it on the device
        whether to skip. That is read before the step, where `loss_scale` waits for the same work of
        the device; without torch.amp there is nothing to read.
        """
        is_skipped = False

        def note() -> None:
            nonlocal is_skipped
            found_inf = getattr(self._optimizer, "found_inf", None)
            is_skipped = found_inf is not None and bool(found_inf)

        def call() -> None:
            if not is_skipped:
                after_update()

        return [before_step_of(self._optimizer, note), after_step_of(self._optimizer, call)]

    def _count_step(self) -> None:
        self._step += 1

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def restore_step(self, step: int) -> None:
        self._step = step


class WholeTensors:
    """The `DistributedTensors` of an engine whose ranks hold every parameter whole.

    Args:
        shapes: of the parameters, by name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def wrap(self, fragment: Fragment, values: torch.Tensor) -> Any:
        return values.reshape(self._shapes[fragment.parameter])

    def local_part(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(-1)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside torch.compile and DistributedDataParallel, in any order."""
    while True:
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), torch.nn.Module):
            model = inner
        else:
            return model


def _refuse_fsdp1(module: torch.nn.Module) -> None:
    if not dist.is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        raise UnsupportedEngineError(
            "spectral_ds does not support FullyShardedDataParallel (FSDP1); "
            "use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
