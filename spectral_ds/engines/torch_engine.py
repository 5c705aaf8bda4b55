"""A plain torch module or DDP with a torch optimizer: every rank holds the full gradient.

Hooks run at the optimizer's step (`steps`), so the first runs after whatever the training loop does
between backward and `step()`, or after an evaluation of its closure. A loop that clips calls
`plugin.filter_gradients()` before. `FSDP2Engine` differs in who owns what only.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from spectral_ds.engines.base import (
    Engine,
    UnsupportedEngineError,
    canonical_name,
    learning_rate_of,
)
from spectral_ds.engines.capabilities import DistributedTensors
from spectral_ds.engines.hooks import WrappedMethod
from spectral_ds.engines.newcomers import Admission, Known, label_of, reason_to_leave_out
from spectral_ds.engines.others import OtherOptimizers
from spectral_ds.engines.replicas import Joining, group_of, replicas_of
from spectral_ds.engines.steps import StepCalls
from spectral_ds.engines.views import (
    flat_view,
    plain_gradient,
    real_shape,
    reason_without_view,
    refuse,
    sparse_among,
)
from spectral_ds.engines.wrappers import (
    layers_of,
    parameters_of,
    stepping_optimizer,
    takes_half_steps,
)
from spectral_ds.sharding import Communicator, Fragment


class TorchEngine(Engine):
    """One fragment a parameter, the same on all ranks; every rank filters all of them alike.

    `everyone` is the process group of DistributedDataParallel. A module that is in none counts as
    trained by all ranks alike, however they average its gradients.

    Args:
        model: a module, or one in DistributedDataParallel or nn.DataParallel; may be compiled, or
            hold several of these.
        optimizer: the optimizer that trains it, or a wrapper around that.

    Raises:
        UnsupportedEngineError: FSDP1 is in use, the optimizer trains none of the parameters, it is
            not known which optimizer a wrapper steps, or the model is in a `join()` that ranks may
            have left.
    """

    optimizer: torch.optim.Optimizer
    _way_out = ""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        module = unwrapped(model)
        _refuse_fsdp1(module)
        self.module, self.optimizer = module, stepping_optimizer(optimizer)
        self.calls_copies = any(map(_calls_copies, model.modules()))
        self._wrappers = layers_of(optimizer)[:-1]
        self._step = self._climbs = 0
        self._calls: StepCalls | None = None
        self._has_warned = False
        self._handles: list[Any] = []
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._replicas = replicas_of(model)
        self._joining = Joining(self._replicas)
        if not self._joining.is_complete:
            raise UnsupportedEngineError("ranks may have left this join(): attach before it begins")
        self.holders = (model, module, *parts_of(module), *self._wrappers, self.optimizer)
        found = self._trained()
        if not found:
            raise UnsupportedEngineError(
                f"optimizer: it trains no parameter of the model{self._way_out}"
            )
        refuse(found, self._reason_against)
        self._find_ranks(found)
        self._have(found)
        self._known = Known(found.values())

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters of the module that the optimizer trains, by name, in model order.

        Frozen ones that have a fragment keep it: an adapter may be switched on again.
        """
        trained = set(map(id, parameters_of(self.optimizer)))
        kept = {id(parameter) for parameter in self._parameters.values()}
        return {
            canonical_name(name): parameter
            for name, parameter in self.module.named_parameters()
            if id(parameter) in trained
            and (parameter.requires_grad or id(parameter) in kept)
            and parameter.numel() > 0
        }

    def _reason_against(self, parameter: torch.Tensor) -> str | None:
        """Why a parameter cannot be filtered; None: it can."""
        if parameter.is_meta:
            return (
                "is on the device meta, without values; give the model memory (to_empty) and "
                "weights first"
            )
        return reason_without_view(parameter)

    def _find_ranks(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Set `communicator` and `everyone`."""
        device = next(iter(parameters.values())).device
        self.everyone = Communicator(group_of(self._replicas), device)
        self.communicator = Communicator.alone(device)

    def _have(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Set `shapes`, `named`, `fragments`, `tensors`: one fragment each, in this order."""
        self._parameters = parameters
        self.named = {canonical_name(n): p for n, p in self.module.named_parameters()}
        self.shapes = {name: real_shape(parameter) for name, parameter in parameters.items()}
        self.fragments = [self._fragment(name, p) for name, p in parameters.items()]
        self.tensors = self._tensors()

    def _fragment(self, name: str, parameter: torch.nn.Parameter) -> Fragment:
        """What this rank owns of a parameter."""
        return Fragment(name, 0, math.prod(real_shape(parameter)))

    def _tensors(self) -> DistributedTensors:
        return WholeTensors(self.shapes)

    def newcomers(self) -> list[torch.Tensor]:
        return self._known.others(group["params"] for group in self.optimizer.param_groups)

    def admit(self, newcomers: Sequence[torch.Tensor]) -> Admission:
        self._known.add(newcomers)
        before, found = self._parameters, self._trained()
        names = {id(p): canonical_name(n) for n, p in self.module.named_parameters()}
        left_out = {}
        for parameter in newcomers:
            name = label_of(parameter, names, self.module)
            if name not in found:
                left_out[name] = reason_to_leave_out(id(parameter) in names)
            elif (reason := self._reason_against(parameter)) is not None:
                left_out[name] = reason
        kept = {id(parameter) for parameter in before.values()}
        # Also without those that were left out earlier.
        found = {n: p for n, p in found.items() if id(p) in kept or not self._reason_against(p)}
        joined = [name for name, parameter in found.items() if id(parameter) not in kept]
        if joined:
            self._have(found)
        return Admission(joined, left_out, lambda: self._have(before))

    @property
    def is_complete(self) -> bool:
        return self._joining.is_complete

    def when_complete(self, function: Callable[[], None]) -> None:
        self._handles += self._joining.at_end(function)

    def watch_others(self) -> None:
        def tell(other: torch.optim.Optimizer) -> None:
            self.log(
                f"not filtered: a step of {type(other).__name__}, which trains parameters for "
                f"which the plugin is attached to {type(self.optimizer).__name__}: attach to the "
                "optimizer in use",
                logging.WARNING,
            )

        self._handles.append(
            OtherOptimizers(
                self.optimizer, lambda: self._parameters.values(), lambda: self._step, tell
            )
        )

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
    def evaluations(self) -> int:
        return 0 if self._calls is None else self._calls.evaluations

    @property
    def climbs(self) -> int:
        return self._climbs

    @property
    def loss_scale(self) -> float:
        # Set inside a step that leaves it to a fused optimizer to divide by torch.amp's scale.
        scale = getattr(self.optimizer, "grad_scale", None)
        return 1.0 if scale is None else float(scale)

    def learning_rates(self) -> list[float]:
        groups = self.optimizer.param_groups
        by_id = {id(parameter): group for group in groups for parameter in group["params"]}
        found = [by_id.get(id(parameter)) for parameter in self._parameters.values()]
        used = {id(group): group for group in found if group is not None}
        rates = {key: learning_rate_of(group) for key, group in used.items()}
        # What the optimizer has no longer, or is frozen, stays as it is.
        trained = zip(found, self._parameters.values(), strict=True)
        return [rates.get(id(group), 0.0) * each.requires_grad for group, each in trained]

    def gradients(self) -> list[torch.Tensor | None]:
        trained = set(map(id, parameters_of(self.optimizer)))  # less those that have left it
        gradients = [
            plain_gradient(parameter) if id(parameter) in trained else None
            for parameter in self._parameters.values()
        ]
        return [None if gradient is None else self._local(gradient) for gradient in gradients]

    def sparse_gradients(self) -> frozenset[str]:
        return sparse_among(self._parameters)

    def weights(self) -> list[torch.Tensor]:
        try:
            return [self._local(parameter.detach()) for parameter in self._parameters.values()]
        except RuntimeError:  # laid out anew since it was attached, as by to(memory_format=...)
            refuse(self._parameters, self._reason_against)
            raise

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

        self._calls = StepCalls(self.optimizer, begin, ready, end, self._warn)
        self._handles = [self._calls]
        self._handles += [
            WrappedMethod(wrapper, "first_step", self._climb)
            for wrapper in filter(takes_half_steps, self._wrappers)
        ]

    def _climb(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._climbs += 1
        return original(*args, **kwargs)

    def _is_skipped(self) -> bool:
        """Whether torch.amp has a fused optimizer skip this step.

        torch.amp calls the step of a fused optimizer in any case, and tells it on the device
        whether to skip. That is read before the step, where `loss_scale` waits for the same work of
        the device; without torch.amp there is nothing to read.
        """
        found_inf = getattr(self.optimizer, "found_inf", None)
        return found_inf is not None and bool(found_inf)

    def _warn_of_evaluations(self) -> None:
        """Every gradient is filtered, as is right for those that descend by all of them."""
        if isinstance(self.optimizer, torch.optim.LBFGS) or self._has_warned:
            return
        self._has_warned = True
        self._warn(
            f"{type(self.optimizer).__name__} evaluates its closure several times in a step: each "
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
    """The module inside torch.compile and (Distributed)DataParallel, in any order."""
    wrappers = torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), torch.nn.Module):
            model = inner
        else:
            return model


def parts_of(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The models that a list or dictionary of modules holds, each also without its wrappers."""
    if not isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict):
        return []
    children = list(module.children())
    return list(dict.fromkeys([*children, *map(unwrapped, children)]))


def _calls_copies(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.DataParallel) and len(module.device_ids) > 1


def _refuse_fsdp1(module: torch.nn.Module) -> None:
    if not dist.is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        raise UnsupportedEngineError(
            "spectral_ds does not support FullyShardedDataParallel (FSDP1); "
            "use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
