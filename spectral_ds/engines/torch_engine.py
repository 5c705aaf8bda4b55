"""A plain torch module or DDP with a torch optimizer: every rank holds the full gradient.

Hooks run at the optimizer's step (`steps`), so the first runs after whatever the training loop does
between backward and `step()`, or after an evaluation of its closure. A loop that clips calls
`plugin.filter_gradients()` before. `FSDP2Engine` differs in who owns what only.
"""

import logging
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
from spectral_ds.engines.hooks import WrappedMethod
from spectral_ds.engines.steps import StepCalls, StepsInside
from spectral_ds.engines.wrappers import (
    has_hooks,
    layers_of,
    parameters_of,
    stepping_optimizer,
    takes_half_steps,
)
from spectral_ds.sharding import Communicator, Fragment


class TorchEngine(Engine):
    """One fragment a parameter, the same on all ranks; every rank filters all of them alike.

    Args:
        model: a module, or one in DistributedDataParallel; may be compiled.
        optimizer: the optimizer that trains it, or a wrapper around that.

    Raises:
        UnsupportedEngineError: FSDP1 is in use, the optimizer trains none of the parameters, or it
            is not known which optimizer a wrapper steps.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        module = unwrapped(model)
        _refuse_fsdp1(module)
        self._optimizer = stepping_optimizer(optimizer)
        self._wrappers = layers_of(optimizer)[:-1]
        self._step = self._climbs = 0
        self._calls: StepCalls | None = None
        self._has_warned = False
        self._handles: list[Any] = []
        self.holders = (model, module, *self._wrappers, self._optimizer)
        trained = set(map(id, parameters_of(self._optimizer)))
        named = {
            canonical_name(name): parameter
            for name, parameter in module.named_parameters()
            if id(parameter) in trained and parameter.requires_grad and parameter.numel() > 0
        }
        if not named:
            raise UnsupportedEngineError("optimizer: it trains no parameter of the model")
        for name, parameter in named.items():
            if not parameter.is_contiguous():
                raise UnsupportedEngineError(
                    f"parameter {name!r} is not contiguous in memory (strides "
                    f"{parameter.stride()}), so it has no flat view; make it contiguous"
                )
        # One fragment each, in this order.
        self._parameters = named
        self.shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
        self._find_shards()

    def _find_shards(self) -> None:
        """Set `communicator`, `everyone`, `fragments` and `tensors`."""
        device = next(iter(self._parameters.values())).device
        self.everyone = Communicator(None, device)
        self.communicator = Communicator.alone(device)
        self.fragments = [Fragment(name, 0, p.numel()) for name, p in self._parameters.items()]
        self.tensors = WholeTensors(self.shapes)

    def _local(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a parameter or gradient, flat."""
        return tensor.view(-1)

    @property
    def config_section(self) -> Any:
        return None

    @property
    def step(self) -> int:
        return self._step

    @property
    def evaluations(self) -> int:
        return 0 if self._calls is None else self._calls.evaluations

    @property
    def climbs(self) -> int:
        return self._climbs

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
        gradients = [parameter.grad for parameter in self._parameters.values()]
        return [None if gradient is None else self._local(gradient) for gradient in gradients]

    def weights(self) -> list[torch.Tensor]:
        return [self._local(parameter.detach()) for parameter in self._parameters.values()]

    def install(
        self,
        before_step: Callable[[], None],
        after_update: Callable[[], None] | None = None,
        begin_step: Callable[[], None] | None = None,
    ) -> None:
        is_skipped = False

        def begin() -> None:
            nonlocal is_skipped
            is_skipped = after_update is not None and self._is_skipped()
            if begin_step is not None:
                begin_step()

        def end() -> None:
            if after_update is not None and not is_skipped:
                after_update()
            self._step += 1

        def ready() -> None:
            before_step()
            if begin_step is None and self.evaluations == 1:
                self._warn_of_evaluations()

        self._calls = StepCalls(self._optimizer, begin, ready, end, self._warn)
        self._handles = [self._calls]
        self._handles += [
            WrappedMethod(wrapper, "first_step", self._climb)
            for wrapper in filter(takes_half_steps, self._wrappers)
        ]
        for wrapper in filter(has_hooks, self._wrappers):
            self._handles.append(
                StepsInside(wrapper, self._optimizer, lambda: self._step, self._warn)
            )

    def _climb(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._climbs += 1
        return original(*args, **kwargs)

    def _is_skipped(self) -> bool:
        """Whether torch.amp has a fused optimizer skip this step.

        torch.amp calls the step of a fused optimizer in any case, and tells it on the device
        whether to skip. That is read before the step, where `loss_scale` waits for the same work of
        the device; without torch.amp there is nothing to read.
        """
        found_inf = getattr(self._optimizer, "found_inf", None)
        return found_inf is not None and bool(found_inf)

    def _warn_of_evaluations(self) -> None:
        """Every gradient is filtered, as is right for those that descend by all of them."""
        if isinstance(self._optimizer, torch.optim.LBFGS) or self._has_warned:
            return
        self._has_warned = True
        self._warn(
            f"{type(self._optimizer).__name__} evaluates its closure several times in a step: each "
            "gradient is filtered, also one that it only climbs by, if it is a sharpness-aware "
            "optimizer; with filter.apply_to: update, what a step changes is filtered, once"
        )

    def _warn(self, message: str) -> None:
        self.log(message, logging.WARNING)

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
