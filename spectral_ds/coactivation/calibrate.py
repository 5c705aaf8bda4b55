"""Calibration: a model is called with some inputs, and its activations become graphs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from spectral_ds.coactivation.graph import Coactivation, summed
from spectral_ds.coactivation.inputs import Batch
from spectral_ds.coactivation.moments import Projections
from spectral_ds.coactivation.observer import Observer
from spectral_ds.coactivation.sites import Site
from spectral_ds.engines.fsdp2 import sharded_modules
from spectral_ds.sharding import Communicator


def calibrate(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    rank: int,
    seed: int,
    everyone: Communicator,
    progress: Callable[[int], object],
) -> Coactivation:
    """Call the model with batches, each on one rank, in evaluation (collective).

    All ranks make as many calls, so that a sharded model can gather its weights: where batches are
    left over, some calls do not count. Random generators are left as they were.

    Args:
        model: the module itself, not compiled.
        sites: whose inputs are wanted.
        batches: equal on all ranks.
        rank: directions to keep of each graph.
        seed: of the sketches.
        everyone: the ranks that train together.
        progress: told of the batches done since its last call.

    Raises:
        Exception: what the model raises of a batch, on all ranks; where ranks gather weights of
            each other in the call, if it raises on all of them.
    """
    projections = Projections(rank, seed, everyone.device)
    observer = Observer(model, sites, projections, everyone.device)
    observer.start()
    try:
        with only_looking(model):
            for first in range(0, len(batches), everyone.world_size):
                own = first + everyone.rank
                observer.is_counting = own < len(batches)
                with everyone.all_or_none():
                    batches[min(own, len(batches) - 1)](model)
                progress(min(everyone.world_size, len(batches) - first))
    finally:
        observer.stop()
    return summed(observer, sites, projections, rank, everyone)


@contextmanager
def only_looking(model: nn.Module) -> Iterator[None]:
    """The model in evaluation, without gradients; all is as before when the body ends."""
    training = {module: module.training for module in model.modules()}
    config: Any = getattr(model, "config", None)
    caches = getattr(config, "use_cache", None)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    stance: Any = getattr(torch.compiler, "set_stance", None)
    with (
        torch.random.fork_rng(list(devices)),
        torch.no_grad(),
        stance("force_eager") if stance is not None else nullcontext(),
    ):
        model.eval()
        if caches is not None:
            config.use_cache = False
        try:
            yield
        finally:
            for module, flag in training.items():
                module.training = flag
            if caches is not None:
                config.use_cache = caches
            for each in sharded_modules(model):  # FSDP2 does so after a backward pass alone
                each.reshard()
