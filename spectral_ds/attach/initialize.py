"""Ways in: `initialize` for DeepSpeed scripts, `attach` for an engine that exists, `plugin_of`."""

import inspect
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from spectral_ds.config import SECTION, SpectralConfig, SpectralConfigError, load_config, read_json
from spectral_ds.console.messages import logger
from spectral_ds.engines import Engine, NothingToFilterError, engine_for
from spectral_ds.plugin import SpectralPlugin
from spectral_ds.sharding import Communicator
from spectral_ds.stack.names import listed

SECONDS_OF_PATIENCE = 20.0
# By what they are attached to, oldest first. The engine's hook keeps its plugin alive; these
# references do not.
_plugins: "weakref.WeakKeyDictionary[Any, list[weakref.ref[SpectralPlugin]]]" = (
    weakref.WeakKeyDictionary()
)
_told: "weakref.WeakSet[Any]" = weakref.WeakSet()


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize`, with the plugin attached if its config has the section "spectral_ds".

    Takes the arguments of `deepspeed.initialize` and returns its four results. Without the
    section, with `enabled: false`, or without an optimizer (a frozen reference model), DeepSpeed
    does as it does by itself.

    Raises:
        SpectralConfigError: the section is wrong, or differs between ranks; on all ranks alike,
            before DeepSpeed builds its engine.
        UnsupportedEngineError: the engine that the config makes is not supported; on all ranks.
    """
    import deepspeed

    check_section(deepspeed.initialize, args, kwargs)
    results: tuple[Any, Any, Any, Any] = deepspeed.initialize(*args, **kwargs)
    # Under `spectral_ds.run`, the call above has attached it.
    if results[0].config.get(SECTION) is not None and plugin_of(results[0]) is None:
        take_over(results[0])
        try:
            attach(results[0])
        except NothingToFilterError as reason:  # the config may be shared with models that train
            if results[0] not in _told and results[0].global_rank == 0:
                logger.info(f"nothing to filter in {type(results[0].module).__name__}: {reason}")
    return results


def take_over(engine: Any) -> None:
    """Detach the plugins of earlier DeepSpeed engines of a module that another one trains now."""
    from deepspeed import DeepSpeedEngine

    for plugin in plugins_of(engine.module):
        other = plugin.engine.holders[0]
        if isinstance(other, DeepSpeedEngine) and other is not engine:
            plugin.detach()
            what = type(engine.module).__name__
            plugin.engine.log(
                f"detached from an earlier engine of {what}, which another trains now"
            )


def has_been_told(engine: Any) -> None:
    """Remember that the user knows that a DeepSpeed engine has nothing to filter."""
    _told.add(engine)


def check_section(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Check the section of the config that `deepspeed.initialize` is about to read (collective).

    Args:
        function: `deepspeed.initialize`.
        args: its arguments.
        kwargs: likewise.

    Raises:
        SpectralConfigError: it is wrong, or differs between ranks; on all ranks.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    given = inspect.signature(function).bind(*args, **kwargs).arguments
    deepspeed.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        dist_init_required=given.get("dist_init_required"),
        **{key: given[key] for key in ("distributed_port",) if key in given},
    )
    # As the engine does, later: NCCL refuses what lies on another device than the rank's own.
    device_rank = getattr(given.get("args"), "device_rank", int(os.environ.get("LOCAL_RANK", -1)))
    if device_rank >= 0:
        get_accelerator().set_device(device_rank)
    world = Communicator(None, torch.device(get_accelerator().current_device_name()))
    agree_on_config(lambda: _section(given), world)


def attach(
    model_or_engine: Any,
    optimizer: torch.optim.Optimizer | None = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | SpectralConfig | None = None,
    writer: Any = None,
) -> SpectralPlugin | None:
    """Attach the plugin to an engine that exists (collective on the engine's ranks).

    These are the process group of DistributedDataParallel, the mesh of `fully_shard`, the data
    parallel group of DeepSpeed. A module in none of them counts as trained by all ranks alike; for
    one that only some ranks train, put it in DistributedDataParallel on a group of these.

    Several optimizers of one module, of different parameters, have a plugin each.

    Args:
        model_or_engine: a DeepSpeed engine, or a torch module: plain, in DistributedDataParallel,
            or sharded by `fully_shard` (FSDP2, HSDP); each may be compiled. Several models
            with one optimizer: in a `torch.nn.ModuleDict` or `ModuleList`.
        optimizer: the optimizer that trains the module, or a wrapper around it; not for DeepSpeed.
        config: see `load_config`; by default the section of the engine's own config.
        writer: a `torch.utils.tensorboard.SummaryWriter` for the metrics and figures, on rank 0;
            by default `monitor.folder`, else the engine's own monitor.

    Returns:
        The plugin, or None with `enabled: false`.

    Raises:
        SpectralConfigError: there is no section, it is wrong, or it differs between ranks.
        UnsupportedEngineError: the engine is not supported.
        NothingToFilterError: likewise, as a DeepSpeed engine has no optimizer.
        RuntimeError: a plugin is attached already, to some of the same parameters.
    """
    plugin = attach_unwatched(model_or_engine, optimizer, config, writer)
    if plugin is not None:
        plugin.engine.watch_others()
    return plugin


def attach_unwatched(
    model_or_engine: Any,
    optimizer: torch.optim.Optimizer | None = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | SpectralConfig | None = None,
    writer: Any = None,
    *,
    writes_metrics: bool = False,
) -> SpectralPlugin | None:
    """`attach`, by one who minds other optimizers himself; also inside of an optimizer's step.

    Args:
        writes_metrics: whether the caller writes the plugin's metrics somewhere.
    """
    engine = engine_for(model_or_engine, optimizer)

    def source() -> Any:
        _refuse_rivals(engine)
        if config is not None:
            return config
        if engine.config_section is None:
            raise SpectralConfigError(
                f'no config was given, and the engine\'s config has no section "{SECTION}"'
            )
        return {SECTION: engine.config_section}

    agreed = agree_on_config(source, engine.everyone)
    assert agreed is not None, "source() always gives a config"
    if not agreed.enabled:
        return None
    plugin = SpectralPlugin(engine, agreed, writer)
    for holder in dict.fromkeys(engine.holders):
        _plugins[holder] = [*map(weakref.ref, plugins_of(holder)), weakref.ref(plugin)]
    engine.log(plugin.describe())
    if not writes_metrics:
        plugin.monitor.say_if_written_nowhere()
    return plugin


def plugin_of(engine_or_model: Any) -> SpectralPlugin | None:
    """The plugin attached to this engine, model or torch optimizer; None if there is none.

    Of several optimizers of one model, each has its own; the model gives that of the first.
    """
    return next(iter(plugins_of(engine_or_model)), None)


def plugins_of(engine_or_model: Any) -> list[SpectralPlugin]:
    """All plugins attached to it, oldest first: one for each of its optimizers."""
    found = [reference() for reference in _plugins.get(engine_or_model, ())]
    return [plugin for plugin in found if plugin is not None and plugin.attached]


def _refuse_rivals(engine: Engine) -> None:
    """Raise RuntimeError if a plugin filters some of the engine's parameters already."""
    for holder in dict.fromkeys(engine.holders):
        for plugin in plugins_of(holder):
            if common := [name for name in engine.shapes if name in plugin.engine.shapes]:
                raise RuntimeError(
                    f"a spectral_ds plugin is attached already, to {listed(common)}: call its "
                    "detach() first, or give each optimizer parameters of its own"
                )


def agree_on_config(source: Callable[[], Any], communicator: Communicator) -> SpectralConfig | None:
    """Read the configuration on each rank and compare by digest (collective).

    Args:
        source: gives what `load_config` reads, or None for "no section".

    Raises:
        SpectralConfigError: on every rank, if it is wrong on any or differs between them.
    """
    config: SpectralConfig | None = None
    with _said_if_it_waits(communicator), communicator.all_or_none():
        given = source()
        if isinstance(given, SpectralConfig):
            config = given
        elif given is not None:
            config = load_config(given)
    digests = communicator.gather_objects("no section" if config is None else config.digest())
    if len(set(digests)) > 1:
        listed = ", ".join(f"rank {rank}: {digest[:12]}" for rank, digest in enumerate(digests))
        raise SpectralConfigError(
            f"{SECTION}: ranks have different configurations ({listed}); all must read the same"
        )
    return config


@contextmanager
def _said_if_it_waits(communicator: Communicator) -> Iterator[None]:
    """Say, on each rank that waits, that others are missing, if the body takes long."""
    count = communicator.world_size
    waiting = threading.Timer(
        SECONDS_OF_PATIENCE,
        logger.warning,
        [
            f"rank {communicator.rank} of {count} still waits for others to attach: all {count} "
            "have to, at the same point; a plain module that only some ranks train goes into "
            "DistributedDataParallel on a process group of these"
        ],
    )
    waiting.daemon = True
    if count > 1:
        waiting.start()
    try:
        yield
    finally:
        waiting.cancel()


def _section(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """{"spectral_ds": ...} of the config that DeepSpeed will read, if it has the section.

    What is neither a mapping nor a readable file is left to DeepSpeed to refuse.
    """
    places = (
        given.get("config"),
        given.get("config_params"),
        getattr(given.get("args"), "deepspeed_config", None),
    )
    config = next((place for place in places if place is not None), None)
    if isinstance(config, str | os.PathLike) and os.path.isfile(config):
        config = read_json(config)
    if isinstance(config, Mapping) and SECTION in config:
        return {SECTION: config[SECTION]}
    return None
