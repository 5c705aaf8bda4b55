"""What all DeepSpeed engines share: the hooks, the step, the records of what a rank owns.

`before_step` wraps `engine._take_model_step`: it runs only at the accumulation boundary, before
overflow check, norm and clipping. (An optimizer pre-step hook would come after clipping, and
once per parameter group.) Programs that call `optimizer.step()` in its place are hooked there
(`deepspeed_direct`). `after_update` has its place in the step of each kind of optimizer.
"""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from spectral_ds.engines.base import (
    Engine,
    UnsupportedEngineError,
    canonical_name,
    learning_rate_of,
)
from spectral_ds.engines.deepspeed_checkpoints import DeepSpeedCheckpoints
from spectral_ds.engines.deepspeed_direct import DirectSteps
from spectral_ds.engines.deepspeed_monitor import DeepSpeedMonitor
from spectral_ds.engines.hooks import WrappedMethod
from spectral_ds.engines.newcomers import Admission
from spectral_ds.engines.used import UsedParameters
from spectral_ds.engines.views import refuse_complex
from spectral_ds.sharding import Communicator, Fragment

HOOKED = "_take_model_step"


@dataclass(frozen=True, eq=False)
class PlacedFragment:
    """A fragment and where the optimizer keeps it.

    Attributes:
        fragment: the run of the flattened parameter that this rank owns.
        parameter: the parameter.
        group: index of the optimizer's parameter group.
        offset: elements before the fragment in the flat tensor that it lies in.
    """

    fragment: Fragment
    parameter: torch.nn.Parameter
    group: int
    offset: int

    def part_of(self, flat: torch.Tensor) -> torch.Tensor:
        """The view of the fragment in the flat tensor that it lies in."""
        return flat.view(-1).narrow(0, self.offset, self.fragment.length)


Placed = TypeVar("Placed", bound=PlacedFragment)


class DeepSpeedEngine(Engine, Generic[Placed]):
    """Base of the adapters for a `deepspeed.DeepSpeedEngine`.

    A subclass says where gradients and weights live, by one `PlacedFragment` a fragment, and when
    the weights have been updated.

    Args:
        engine: the user's engine.
        group: the ranks over which its parameters are sharded or replicated.
    """

    takes_newcomers = False  # partitions are made once

    def __init__(self, engine: Any, group: Any) -> None:
        self._engine = engine
        self._optimizer = engine.optimizer
        self._handles: list[Any] = []
        self.holders = (engine, engine.module)
        self.module, self.optimizer = engine.module, engine.basic_optimizer
        self.everyone = Communicator(group, torch.device(engine.device))
        self.communicator = self.everyone
        self._direct = DirectSteps(engine)
        self.checkpoints: DeepSpeedCheckpoints = DeepSpeedCheckpoints(engine, self._direct)
        if engine.monitor.enabled:
            self.monitor = DeepSpeedMonitor(engine, lambda: self.board_step)
        self._placed: list[Placed] = []
        # DeepSpeed keeps the float32 gradient on the CPU, and norms that it took during backward.
        self._is_offloaded = False
        # The gradient of a parameter that a step does not use is that of an earlier step, or zeros.
        self._keeps_old_gradients = False
        self._used: UsedParameters | None = None
        self._frozen = [p for p in engine.module.parameters() if not p.requires_grad]
        self._name_all(engine.module)
        trained = {name: p for name, p in self.named.items() if p.requires_grad}
        refuse_complex(trained, "DeepSpeed")

    def _name_all(self, module: torch.nn.Module) -> None:
        """Note the parameters of the model, and their names."""
        self.named = {canonical_name(n): p for n, p in module.named_parameters()}
        self._name_of = {id(parameter): name for name, parameter in self.named.items()}

    def _fragment(self, parameter: torch.nn.Parameter, start: int, length: int) -> Fragment:
        return Fragment(self._name_of[id(parameter)], start, length)

    def _own(self, placed: Iterable[Placed]) -> None:
        """Set what this rank owns, and with it `fragments`."""
        self._placed = list(placed)
        self.fragments = [each.fragment for each in self._placed]

    def _shapes_of(self, trained: set[int]) -> dict[str, tuple[int, ...]]:
        """Full shapes of the parameters with these ids, in model order."""
        return {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self.named.items()
            if id(parameter) in trained and getattr(parameter, "ds_numel", parameter.numel()) > 0
        }

    def newcomers(self) -> Sequence[torch.Tensor]:
        return [parameter for parameter in self._frozen if parameter.requires_grad]

    def admit(self, newcomers: Sequence[torch.Tensor]) -> Admission:
        names = [self._name_of[id(parameter)] for parameter in newcomers]
        self._frozen = [parameter for parameter in self._frozen if not parameter.requires_grad]
        reason = "unfrozen after DeepSpeed had made its partitions, so not trained either"
        return Admission([], dict.fromkeys(names, reason))

    @property
    def config_section(self) -> Any:
        return self._engine.config.get("spectral_ds")

    @property
    def step(self) -> int:
        return int(self._engine.global_steps) + self._direct.taken

    @property
    def skipped_steps(self) -> int:
        return int(self._engine.skipped_steps) + self._direct.skipped

    @property
    def evaluations(self) -> int:
        return self._direct.evaluations

    @property
    def loss_scale(self) -> float:
        # Under torch_autocast in float16, torch keeps the scale, on the device.
        scaler = getattr(self._engine, "torch_autocast_z0_gradscaler", None) or getattr(
            self._optimizer, "torch_autocast_gradscaler", None
        )
        if scaler is not None:
            return float(scaler.get_scale())
        return float(getattr(self._optimizer, "loss_scale", None) or 1.0)

    def learning_rates(self) -> list[float]:
        groups = self._optimizer.param_groups
        rates = {n: learning_rate_of(groups[n]) for n in {p.group for p in self._placed}}
        return [rates[placed.group] * placed.parameter.requires_grad for placed in self._placed]

    def _has_gradient(self, placed: Placed) -> bool:
        """Whether the parameter got a gradient since the last step."""
        return self._used is None or placed.parameter in self._used

    def gradients_changed(self) -> None:
        if self._is_offloaded:
            norms = self._optimizer.norm_for_param_grads
            for placed, gradient in zip(self._placed, self.gradients(), strict=True):
                if gradient is not None:
                    norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
                    norms[self._optimizer.get_param_id(placed.parameter)] = norm

    def install(
        self,
        before_step: Callable[[], None],
        after_update: Callable[[], None] | None = None,
        begin_step: Callable[[], None] | None = None,
    ) -> None:
        def begin() -> None:
            if begin_step is not None:
                begin_step()

        def ready() -> None:
            before_step()
            if self._used is not None:
                self._used.clear()

        def take_model_step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            begin()
            ready()
            with self._direct.within_engine_step():
                return original(*args, **kwargs)

        self._handles = []
        if after_update is not None:
            self._handles.append(self._call_after_update(after_update))
        if self._keeps_old_gradients:
            self._used = UsedParameters(placed.parameter for placed in self._placed)
            self._handles.append(self._used)
        self._handles += [
            WrappedMethod(self._engine, HOOKED, take_model_step),
            self._direct.install(begin, ready, lambda said: self.log(said, logging.WARNING)),
        ]

    def watch_loss(self, observe: Callable[[torch.Tensor], None]) -> None:
        def backward(original: Callable[..., Any], loss: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(loss, torch.Tensor):
                # The caller may have divided it already; the whole loss is told.
                divides = kwargs.get("scale_wrt_gas", args[1] if len(args) > 1 else True)
                parts = 1 if divides else self._engine.gradient_accumulation_steps()
                observe(loss.detach() * parts)
            return original(loss, *args, **kwargs)

        self._handles.append(WrappedMethod(self._engine, "backward", backward))

    @abstractmethod
    def _call_after_update(self, after_update: Callable[[], None]) -> Any:
        """Have `after_update` called at its place in the optimizer's step; the handle of it."""

    def _call_after_last_group(
        self,
        after_update: Callable[[], None],
        count: int,
        copy_to_low_precision: Callable[[int], None],
    ) -> Any:
        """`_call_after_update` where the optimizer steps group by group, copying each at once.

        Called after the step of the last group; then the others are copied again.

        Args:
            after_update: the hook.
            count: the number of groups.
            copy_to_low_precision: copies a group's float32 weights to this rank's part of the
                parameters.
        """
        if getattr(self._optimizer, "torch_autocast_gradscaler", None) is not None:
            raise UnsupportedEngineError(
                "spectral_ds does not support acting on updates under torch_autocast in float16, "
                "where each parameter group may skip a step by itself; use bfloat16"
            )

        def optimizer_step(original: Callable[..., Any], group: int) -> None:
            original(group)
            if group == count - 1:
                after_update()
                for earlier in range(group):
                    copy_to_low_precision(earlier)

        return WrappedMethod(self._optimizer, "_optimizer_step", optimizer_step)

    def remove(self) -> None:
        for handle in (*self._handles, self.checkpoints):
            handle.remove()
        self._handles = []

    @property
    def batch_size(self) -> int | None:
        return int(self._engine.train_batch_size())

    @property
    def board_step(self) -> int:
        # Where DeepSpeed files its own scalars of this step, after having counted its samples.
        counted = int(self._engine.global_samples)
        return counted + (1 + self._direct.taken) * int(self._engine.train_batch_size())
