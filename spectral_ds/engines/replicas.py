"""DistributedDataParallel in a model: the ranks that it spans, and those that leave early.

In its `join()`, a rank that has no more inputs leaves, and the others go on. What all ranks take
part in has to wait for the end then, where torch gives every rank the weights of the last one.
"""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from spectral_ds.engines.base import UnsupportedEngineError
from spectral_ds.engines.hooks import WrappedMethod

# What torch calls on every rank at the end of join().
END_OF_JOIN = "_sync_final_model"


def replicas_of(model: torch.nn.Module) -> list[DistributedDataParallel]:
    """The outermost modules in DistributedDataParallel; the model itself may be one."""
    if isinstance(model, DistributedDataParallel):
        return [model]
    return [found for child in model.children() for found in replicas_of(child)]


def group_of(replicas: Sequence[DistributedDataParallel]) -> Any:
    """The process group that they share; None, which is all ranks, without any.

    Raises:
        UnsupportedEngineError: they have several.
    """
    groups = [replica.process_group for replica in replicas]
    if any(group != groups[0] for group in groups):
        raise UnsupportedEngineError(
            "the modules in DistributedDataParallel have several process groups; give each group "
            "of ranks a model and an optimizer of its own"
        )
    return groups[0] if groups else None


class Joining:
    """Knows whether ranks may have left a `join()` of some replicas.

    Args:
        replicas: they are in it together.
    """

    def __init__(self, replicas: Sequence[DistributedDataParallel]) -> None:
        self._replicas = replicas
        # Torch never switches off the configuration of a join() that has ended.
        self._ended = [None if _is_inside(r) else _configuration(r) for r in replicas]

    @property
    def is_complete(self) -> bool:
        """Whether all ranks take the present step."""
        for replica, ended in zip(self._replicas, self._ended, strict=True):
            config = _configuration(replica)
            # Where an early end is an error, each forward pass finds out that all are there.
            if config is not ended and config.enable and not config.throw_on_early_termination:
                return False
        return True

    def at_end(self, function: Callable[[], None]) -> list[Any]:
        """Call the function on every rank when a `join()` ends (it may communicate); handles."""

        def wrap(index: int) -> WrappedMethod:
            def end(original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
                original(*args, **kwargs)
                self._ended[index] = _configuration(self._replicas[index])
                function()

            return WrappedMethod(self._replicas[index], END_OF_JOIN, end)

        return [wrap(i) for i, r in enumerate(self._replicas) if hasattr(r, END_OF_JOIN)]


def _configuration(replica: DistributedDataParallel) -> Any:
    """Of the last join(), one object for each."""
    return replica._join_config


def _is_inside(replica: DistributedDataParallel) -> bool:
    """Whether a join() of it is under way: only then there is one alive that is complete."""
    if not _configuration(replica).enable:
        return False
    from torch.distributed.algorithms.join import Join

    joins = [thing for thing in gc.get_objects() if issubclass(type(thing), Join)]
    entered = [vars(join)["_joinables"] for join in joins if "_join_hooks" in vars(join)]
    return any(each is replica for joinables in entered for each in joinables)
