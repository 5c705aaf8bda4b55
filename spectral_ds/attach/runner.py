"""Runner: attaches plugins to whatever a program trains, and lets go of all of it at the end.

In: a configuration, or None to go by the sections of DeepSpeed configs. While it watches,
`deepspeed.initialize` attaches to its engine; torch optimizers are attached at their first clipping
or step, whichever comes first, to the module that they train. Gradients are filtered before torch's
functions clip them. What is not attached is said on rank 0, with the reason.
"""

import os
import sys
import weakref
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from spectral_ds.attach import check_section, plugin_of, plugins_of
from spectral_ds.attach.after_import import AfterImport
from spectral_ds.attach.clipping import FilterBeforeClipping, Training
from spectral_ds.attach.initialize import attach_unwatched, has_been_told, take_over
from spectral_ds.attach.live import deepspeed_engine_of, module_trained_by, name_of
from spectral_ds.config import SECTION, SpectralConfig, SpectralConfigError, load_config
from spectral_ds.engines import UnsupportedEngineError
from spectral_ds.engines.hooks import WrappedMethod
from spectral_ds.engines.replicas import Joining, replicas_of
from spectral_ds.engines.steps import IN_BACKWARD, is_in_backward, not_compiled, running_steps
from spectral_ds.engines.wrappers import (
    layers_of,
    parameters_of,
    stepping_optimizer,
    takes_half_steps,
)
from spectral_ds.plugin import SpectralPlugin

# Names the file with the section, where no DeepSpeed config has it.
VARIABLE = "SPECTRAL_DS_CONFIG"


class Runner:
    """Attaches to what is trained; holds nothing of it alive.

    Args:
        config: for all that is attached; None: that of the DeepSpeed engine.
    """

    def __init__(self, config: SpectralConfig | None) -> None:
        self._config = config
        self._plugins: list[weakref.ref[SpectralPlugin]] = []
        self._trainings: list[Training] = []
        # In the order in which they were built, which is the same on all ranks.
        self._optimizers: list[weakref.ref[torch.optim.Optimizer]] = []
        self._settled: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        # They began to train inside a join(), which ranks may have left: the next one attaches.
        self._postponed: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._is_found = False  # whether anything has a plugin, by this runner or by the program
        self._has_reported = self._has_refused_backward = False
        self._refusals: list[str] = []
        self._handles: list[Any] = []

    def watch(self) -> None:
        """Attach to all that is trained from now on."""
        self._handles += [
            WrappedMethod(torch.optim.Optimizer, "__init__", self._build),
            register_optimizer_step_pre_hook(not_compiled(self._before_step)),
            register_optimizer_step_post_hook(not_compiled(self._after_step)),
            WrappedMethod(DistributedDataParallel, "join_hook", self._enter_join),
            AfterImport("deepspeed", self._watch_deepspeed),
        ]
        self.watch_clipping()

    def watch_clipping(self) -> None:
        """Filter before clipping, for the optimizers that are attached."""
        self._handles.append(FilterBeforeClipping(self._clipped))

    def attach(
        self,
        model_or_engine: Any,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        writes_metrics: bool = False,
    ) -> SpectralPlugin | None:
        """`attach_unwatched` by the configuration (collective); detached by `stop`."""
        plugin = attach_unwatched(
            model_or_engine, optimizer, self._config, writes_metrics=writes_metrics
        )
        if plugin is not None:
            self._is_found = True
            self._plugins.append(weakref.ref(plugin))
            if optimizer is not None:
                optimizer = stepping_optimizer(optimizer)
                self._trainings = [each for each in self._trainings if each.plugin is not None]
                self._trainings.append(Training(optimizer, plugin, len(self._optimizers)))
        return plugin

    def stop(self) -> None:
        """Restore everything that was replaced, and detach."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for reference in self._plugins:
            plugin = reference()
            if plugin is not None and plugin.attached:
                plugin.detach()

    def report(self) -> None:
        """Say, once, that nothing is attached, if so, and why."""
        if self._has_reported:
            return
        self._has_reported = True
        if self._is_found:
            for refusal in self._refusals:
                say(f"not attached to {refusal}")
            return
        reasons = self._refusals or ["no torch optimizer and no DeepSpeed engine took a step"]
        say("\n  ".join(["NOTHING IS ATTACHED; gradients are not filtered:", *reasons]))

    def _refuse(self, what: str, reason: str) -> None:
        self._refusals.append(f"{what}: {reason}")
        if self._has_reported:
            say(f"not attached to {self._refusals[-1]}")

    def _try(self, what: str, target: Any, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Attach, or note why not; a wrong configuration is an error."""
        try:
            plugin = self.attach(target, optimizer)
        except UnsupportedEngineError as error:
            self._refuse(what, str(error))
            return
        if plugin is None:
            self._refuse(what, "the configuration says enabled: false")
            return
        is_first = plugin.engine.everyone.rank == 0  # perhaps of some ranks only
        say(f"attached to {what}", is_first)
        if optimizer is not None and _has_stepped(stepping_optimizer(optimizer)):
            say(
                "it has stepped before: graph and reference are made of the weights as they are "
                "now; the plugin's state of before, if there is one, comes back by "
                "SpectralCallback or plugin.load()",
                is_first,
            )

    # DeepSpeed

    def _watch_deepspeed(self, deepspeed: ModuleType) -> None:
        self._handles.append(WrappedMethod(deepspeed, "initialize", self._initialize))

    def _initialize(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._config is None:
            check_section(original, args, kwargs)
        results = original(*args, **kwargs)
        engine = results[0]
        stage = engine.zero_optimization_stage()
        what = f"the DeepSpeed engine of {name_of(engine.module)} (ZeRO stage {stage})"
        if getattr(engine, "basic_optimizer", None) is None:
            self._refuse(what, "it has no optimizer")
            has_been_told(engine)
        elif self._config is None and engine.config.get(SECTION) is None:
            self._refuse(what, f'its config has no section "{SECTION}", and {VARIABLE} is not set')
        else:
            take_over(engine)
            self._try(what, engine)
        return results

    # Torch optimizers

    def _build(
        self,
        original: Callable[..., Any],
        optimizer: torch.optim.Optimizer,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        original(optimizer, *args, **kwargs)
        self._optimizers.append(weakref.ref(optimizer))

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if optimizer in self._settled or _is_part(optimizer):
            return
        if is_in_backward():
            self._settled.add(optimizer)
            if not self._has_refused_backward:
                self._has_refused_backward = True
                self._refuse(f"{type(optimizer).__name__} and others like it", IN_BACKWARD)
            return
        innermost = layers_of(optimizer)[-1]
        if innermost not in self._settled:
            self._settle(innermost)

    def _after_step(self, *_: Any) -> None:
        if len(running_steps()) <= 1:
            self.report()

    def _enter_join(
        self, original: Callable[..., Any], replica: DistributedDataParallel, **kwargs: Any
    ) -> Any:
        # Inside, a rank may leave before its first step; attaching takes all of them.
        self._postponed.clear()
        self._settle_trainers_of({id(parameter) for parameter in replica.parameters()})
        return original(replica, **kwargs)

    def _clipped(self, tensors: set[int]) -> list[Training]:
        """The trainings of some of what is clipped, attached now if they were not yet."""
        self._settle_trainers_of(tensors)
        half_steps = [layers_of(o)[-1] for o in self._alive() if takes_half_steps(o)]
        # What is clipped may be the gradient of the first half, which is not descended.
        return [
            training
            for training in self._trainings
            if training.trains(tensors)
            and all(training.optimizer is not each for each in half_steps)
        ]

    def _settle_trainers_of(self, tensors: set[int]) -> None:
        """Attach to the optimizers that train some parameters, given by their or gradients' ids."""
        for optimizer in self._alive():
            if optimizer in self._settled or layers_of(optimizer)[-1] is not optimizer:
                continue
            own = {id(p) for p in parameters_of(optimizer)}
            own |= {id(p.grad) for p in parameters_of(optimizer) if p.grad is not None}
            # One that wraps another, or was built for another phase, waits for a step of its own.
            rivals = [each for each in self._trainings if each.trains(own)]
            if own & tensors and all(self._is_younger(optimizer, rival) for rival in rivals):
                self._settle(optimizer)

    def _settle(self, optimizer: torch.optim.Optimizer) -> None:
        """Attach to an optimizer that begins to train, or note why not; once for each."""
        if optimizer in self._postponed:
            return
        self._settled.add(optimizer)
        own = parameters_of(optimizer)
        what = f"{type(optimizer).__name__} of {len(own)} parameters"
        if (engine := deepspeed_engine_of(optimizer)) is not None:
            if plugin_of(engine) is not None:
                self._is_found = True
            elif not self._refusals:
                self._refuse(what, "its DeepSpeed engine was not made by deepspeed.initialize")
            return
        if plugin_of(optimizer) is not None:  # by the program itself
            self._is_found = True
            return
        if self._config is None:
            self._refuse(what, f"no configuration: {VARIABLE} is not set to the name of a file")
            return
        module = module_trained_by(optimizer)
        if module is None:
            self._refuse(what, "no torch module that is alive holds its parameters")
            return
        held = {id(p) for p in module.parameters()}
        what = f"{type(optimizer).__name__} of {name_of(module)}"
        if (missing := sum(id(p) not in held for p in own)) > 0:
            what += f" (but not {missing} of its {len(own)} parameters, which are elsewhere)"
        if not Joining(replicas_of(module)).is_complete:
            self._settled.discard(optimizer)
            self._postponed.add(optimizer)
            self._refuse(what, "built inside join(), which ranks may have left; build it before")
            return
        if not self._takes_over(optimizer, module, what):
            return
        try:
            self._try(what, module, optimizer)
        except SpectralConfigError as error:
            # The configuration is perhaps about what another optimizer trains.
            if not self._shares(module, optimizer):
                raise
            self._refuse(what, str(error))

    def _shares(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """Whether other optimizers train other parameters of the module."""
        held = {id(p) for p in module.parameters()} - {id(p) for p in parameters_of(optimizer)}
        return any(held & {id(p) for p in parameters_of(each)} for each in self._alive())

    def _takes_over(
        self, optimizer: torch.optim.Optimizer, module: torch.nn.Module, what: str
    ) -> bool:
        """Whether to attach to it, in place of others that train some of the same parameters."""
        own = {id(p) for p in parameters_of(optimizer)}
        for training in self._trainings:
            plugin, other = training.plugin, training.optimizer
            if plugin is None or not training.trains(own):
                continue
            plugin.detach()
            say(
                f"{type(other).__name__} is detached: {what} trains the same parameters",
                plugin.engine.everyone.rank == 0,
            )
            if training.is_filtered:  # these gradients; the next are this optimizer's
                self._settled.discard(optimizer)
                return False
        for other in optimizers_attached_to(module):  # by the program itself
            if own & {id(p) for p in parameters_of(other)}:
                self._refuse(
                    what, f"the program has attached {type(other).__name__} of the same parameters"
                )
                return False
        return True

    def _is_younger(self, optimizer: torch.optim.Optimizer, training: Training) -> bool:
        """Whether the optimizer was built after the training was attached."""
        built = [index for index, each in enumerate(self._optimizers) if each() is optimizer]
        return bool(built) and built[0] >= training.since

    def _alive(self) -> list[torch.optim.Optimizer]:
        return [each for reference in self._optimizers if (each := reference()) is not None]


def optimizers_attached_to(module: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Those of the plugins of a module."""
    holders = [holder for plugin in plugins_of(module) for holder in plugin.engine.holders]
    return [holder for holder in holders if isinstance(holder, torch.optim.Optimizer)]


def _is_part(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step, whose hook asks, is a part of a running one of the same parameters."""
    around = running_steps()[1:]
    own = set(map(id, parameters_of(optimizer))) if around else set()
    return any(own & set(map(id, parameters_of(other))) for other in around)


def _has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its state is of earlier steps, as after a checkpoint was loaded."""
    # Some optimizers keep numbers of their own beside the states of parameters.
    states = [state for state in optimizer.state.values() if isinstance(state, Mapping) and state]
    return any(float(state.get("step", 1)) > 0 for state in states)


def config_of_environment() -> SpectralConfig | None:
    """What SPECTRAL_DS_CONFIG names; None if it is not set.

    Raises:
        SpectralConfigError: it cannot be read, or is wrong.
    """
    path = os.environ.get(VARIABLE)
    return load_config(path) if path else None


def rank() -> int:
    """This process's, also before the process group is made and after it is destroyed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def say(message: str, is_first: bool | None = None) -> None:
    """Tell the user, on rank 0.

    Args:
        is_first: whether this rank is the first of those that it is about; None: of all ranks.
    """
    if rank() == 0 if is_first is None else is_first:
        print(f"spectral_ds: {message}", file=sys.stderr, flush=True)
