"""Filtering before a training loop clips: torch's clipping functions, wrapped for a while.

In: the plugins of torch optimizers. A call of `clip_grad_norm_`, `clip_grad_value_` or
`get_total_norm` with their gradients filters these first, once.
"""

import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from spectral_ds.engines.hooks import WrappedMethod
from spectral_ds.engines.steps import not_compiled, version_of
from spectral_ds.engines.views import is_sparse
from spectral_ds.engines.wrappers import parameters_of
from spectral_ds.plugin import SpectralPlugin

CLIPPING = ("clip_grad_norm_", "clip_grad_value_")


class Training:
    """A torch optimizer and the plugin attached to it; keeps neither alive.

    Args:
        optimizer: steps by itself, not inside a DeepSpeed engine.
        plugin: attached to it.
        since: optimizers that had been built by then.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, plugin: SpectralPlugin, since: int = 0
    ) -> None:
        self.since = since
        self._optimizer = weakref.ref(optimizer)
        self._plugin = weakref.ref(plugin)
        # The memory of some gradient and its version, as they were left after filtering and
        # clipping, and the step that this was before, with its evaluations. (torch moves no tensor
        # that has weak references where it does so by swapping, as with those of FSDP2.)
        self._seen: tuple[StorageWeakRef, int, tuple[int, int]] | None = None
        self._has_warned = False

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        return self._optimizer()

    @property
    def plugin(self) -> SpectralPlugin | None:
        """None once it is detached."""
        plugin = self._plugin()
        return plugin if plugin is not None and plugin.attached else None

    def trains(self, tensors: set[int]) -> bool:
        """Whether it trains a parameter whose id, or whose gradient's id, is given."""
        optimizer = self.optimizer
        if optimizer is None or self.plugin is None:
            return False
        return any(
            id(p) in tensors or (p.grad is not None and id(p.grad) in tensors)
            for p in parameters_of(optimizer)
        )

    def filter(self) -> None:
        """Filter the gradients, unless exactly these have been (collective)."""
        plugin = self.plugin
        if plugin is not None and not self.is_filtered:
            self._warn_if_added_to(plugin)
            plugin.filter_gradients()
            self.note()

    def _warn_if_added_to(self, plugin: SpectralPlugin) -> None:
        """Say once that gradients seem to be accumulated after they were filtered."""
        if self._seen is None or self._has_warned:
            return
        memory, _, moment = self._seen
        gradient = self._gradient()
        if moment == _moment_of(plugin) and gradient is not None and memory == _memory_of(gradient):
            self._has_warned = True
            plugin.engine.log(
                "gradients have changed since they were filtered before clipping, with no step in "
                "between. If a step was skipped, that is as it should be. If the loop clips, or "
                "takes their norm, after each micro-batch, what has accumulated is filtered again "
                "each time: clip once before the step, or attach in the script and call "
                "plugin.filter_gradients() there",
                logging.WARNING,
            )

    @property
    def is_filtered(self) -> bool:
        """Whether the gradients are those that were last filtered, clipped or not."""
        if self._seen is None or (gradient := self._gradient()) is None:
            return False
        memory, version, _ = self._seen
        return memory == _memory_of(gradient) and version_of(gradient) == version

    def note(self) -> None:
        """Remember the gradients as filtered."""
        gradient, plugin = self._gradient(), self.plugin
        if gradient is not None and plugin is not None:
            self._seen = _memory_of(gradient), version_of(gradient), _moment_of(plugin)

    def _gradient(self) -> torch.Tensor | None:
        optimizer = self.optimizer
        parameters = () if optimizer is None else parameters_of(optimizer)
        gradients = (p.grad for p in parameters if p.grad is not None)
        return next((each for each in gradients if not is_sparse(each)), None)


def _moment_of(plugin: SpectralPlugin) -> tuple[int, int]:
    return plugin.engine.step, plugin.engine.evaluations


def _memory_of(gradient: Any) -> StorageWeakRef:
    """Its storage; equal for the same one alone, as long as this exists, and keeps no values."""
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return StorageWeakRef(local.untyped_storage())


class FilterBeforeClipping:
    """Wraps torch's functions that clip and take norms of gradients, until `remove`.

    Args:
        trainings: gives those that train some of the tensors with these ids.
    """

    def __init__(self, trainings: Callable[[set[int]], Sequence[Training]]) -> None:
        self._trainings = trainings
        functions = [(torch.nn.utils, name) for name in (*CLIPPING, "get_total_norm")]
        functions += [(torch.nn.utils.clip_grad, name) for name in CLIPPING]
        self._handles = [
            WrappedMethod(module, name, not_compiled(self._around))
            for module, name in functions
            if hasattr(module, name)
        ]

    def _around(
        self,
        original: Callable[..., Any],
        first: torch.Tensor | Iterable[torch.Tensor] = (),
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # The first argument may be given by name, and may be a generator.
        name = next((name for name in ("parameters", "tensors") if name in kwargs), None)
        given = first if name is None else kwargs.pop(name)
        tensors = [given] if isinstance(given, torch.Tensor) else list(given)
        # Accelerate's loops may clip in every micro-batch; only at the last one is there a step.
        trainings = [] if _accelerate_accumulates() else self._trainings(set(map(id, tensors)))
        for training in trainings:
            training.filter()
        result = original(tensors, *args, **kwargs)
        for training in trainings:
            training.note()
        return result

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _accelerate_accumulates() -> bool:
    state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    return state is not None and state._shared_state.get("sync_gradients") is False
