"""What a script trains, found among the live objects of the process.

In: an optimizer. Out: the module that it trains, and whether a DeepSpeed engine steps it.
"""

import gc
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from spectral_ds.engines.fsdp2 import sharded_modules
from spectral_ds.engines.torch_engine import unwrapped
from spectral_ds.engines.wrappers import parameters_of

T = TypeVar("T")


def live(kind: type[T]) -> list[T]:
    """All live objects of a class and its subclasses."""
    # Not isinstance(), which runs code of proxies and of modules that load lazily.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kind)]


def module_trained_by(optimizer: torch.optim.Optimizer) -> torch.nn.Module | None:
    """The module that holds the optimizer's parameters; None if none is alive.

    Of those that hold the most of them: one in DistributedDataParallel or sharded by
    `fully_shard`, the outermost; else a module inside no other, the one with the fewest
    parameters. Where it lacks some, and others of its kind hold these, all of them in a
    `ModuleDict`, by the names of their classes. If there is none, those are looked through too that
    gc.freeze() has put aside, and are so no longer.
    """
    found = _module_trained_by(optimizer)
    if found is None and gc.get_freeze_count() > 0:
        gc.unfreeze()
        found = _module_trained_by(optimizer)
    return found


def _module_trained_by(optimizer: torch.optim.Optimizer) -> torch.nn.Module | None:
    trained = {id(parameter) for parameter in parameters_of(optimizer)}
    modules = [module for module in live(torch.nn.Module) if "_modules" in vars(module)]
    inner = {id(child) for module in modules for child in module.children()}
    wrapped = _wrapped(modules)
    candidates = [*wrapped, *(m for m in modules if id(m) not in inner)]
    found: list[torch.nn.Module] = []
    while trained and (module := _best(candidates, trained, wrapped)) is not None:
        trained -= {id(parameter) for parameter in module.parameters()}
        found.append(module)
        if trained:  # shards and whole parameters do not go together
            is_sharded = bool(sharded_modules(module))
            candidates = [m for m in candidates if bool(sharded_modules(m)) == is_sharded]
    # In the order of the optimizer's parameters, which is the same on all ranks.
    place = {id(parameter): i for i, parameter in enumerate(parameters_of(optimizer))}
    found.sort(key=lambda each: min(place.get(id(p), len(place)) for p in each.parameters()))
    if len(found) < 2:
        return found[0] if found else None
    together = torch.nn.ModuleDict()
    for module in found:
        name, number = type(unwrapped(module)).__name__, 1
        while (key := name if number == 1 else f"{name}_{number}") in together:
            number += 1
        together[key] = module
    return together


def _best(
    candidates: Sequence[torch.nn.Module],
    trained: set[int],
    wrapped: Sequence[torch.nn.Module],
) -> torch.nn.Module | None:
    """The module that holds most of the parameters with these ids; None if none holds any."""
    best, found = (0, False, 0), None
    for module in candidates:
        held = [id(parameter) for parameter in module.parameters()]
        covered = len(trained.intersection(held))
        rank = (covered, any(module is each for each in wrapped), -len(held))
        if covered > 0 and rank > best:
            best, found = rank, module
    return found


def _wrapped(modules: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """The modules in DistributedDataParallel, and the outermost ones of `fully_shard`."""
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    nested = {id(part) for module in sharded for part in module.modules() if part is not module}
    replicated = [module for module in modules if isinstance(module, DistributedDataParallel)]
    return replicated + [module for module in sharded if id(module) not in nested]


def deepspeed_engine_of(optimizer: torch.optim.Optimizer) -> Any:
    """The DeepSpeed engine that steps a torch optimizer; None if none does."""
    deepspeed = sys.modules.get("deepspeed")
    if not hasattr(deepspeed, "DeepSpeedEngine"):
        return None
    for engine in live(deepspeed.DeepSpeedEngine):  # type: ignore[union-attr]
        chain = [getattr(engine, "basic_optimizer", None), getattr(engine, "optimizer", None)]
        chain.append(getattr(chain[-1], "optimizer", None))
        if any(each is optimizer for each in chain):
            return engine
    return None


def name_of(module: torch.nn.Module) -> str:
    """The classes of a module and of what it wraps, for people."""
    if isinstance(module, torch.nn.ModuleDict):
        return " and ".join(map(name_of, module.values()))
    names = [type(module).__name__]
    while isinstance(
        inner := getattr(module, "module", getattr(module, "_orig_mod", None)), torch.nn.Module
    ):
        module = inner
        names.append(type(module).__name__)
    return " of ".join(names)
