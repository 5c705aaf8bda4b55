"""Ways in: `initialize` for DeepSpeed scripts, `attach` for an engine that exists, `plugin_of`."""

import inspect
import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from spectral_ds.config import SECTION, SpectralConfig, SpectralConfigError, load_config, read_json
from spectral_ds.engines import engine_for
from spectral_ds.plugin import SpectralPlugin
from spectral_ds.sharding import Communicator

# The engine's hook keeps its plugin alive; these references do not.
_plugins: "weakref.WeakKeyDictionary[Any, weakref.ref[SpectralPlugin]]" = (
    weakref.WeakKeyDictionary()
)


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize`, with the plugin attached if its config has the section "spectral_ds".

    Takes the arguments of `deepspeed.initialize` and returns its four results. Without the
    section, or with `enabled: false`, DeepSpeed trains as it does by itself.

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
        attach(results[0])
    return results


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
    world = Communicator(None, torch.device(get_accelerator().current_device_name()))
    agree_on_config(lambda: _section(given), world)


def attach(
    model_or_engine: Any,
    optimizer: torch.optim.Optimizer | None = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | SpectralConfig | None = None,
    writer: Any = None,
) -> SpectralPlugin | None:
    """Attach the plugin to an engine that exists (collective on the engine's ranks).

    Args:
        model_or_engine: a DeepSpeed engine, or a torch module: plain, in DistributedDataParallel,
            or sharded by `fully_shard` (FSDP2, HSDP); the latter may be compiled.
        optimizer: the optimizer that trains the module, or a wrapper around it; not for DeepSpeed.
        config: see `load_config`; by default the section of the engine's own config.
        writer: a `torch.utils.tensorboard.SummaryWriter` for the metrics and figures, on rank 0;
            by default the engine's own monitor, or `monitor.folder`.

    Returns:
        The plugin, or None with `enabled: false`.

    Raises:
        SpectralConfigError: there is no section, it is wrong, or it differs between ranks.
        UnsupportedEngineError: the engine is not supported.
        RuntimeError: a plugin is attached already.
    """
    engine = engine_for(model_or_engine, optimizer)

    def source() -> Any:
        if plugin_of(model_or_engine) is not None:
            raise RuntimeError("a spectral_ds plugin is attached already; detach() it first")
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
    reference = weakref.ref(plugin)
    for holder in engine.holders:
        _plugins[holder] = reference
    engine.log(plugin.describe())
    return plugin


def plugin_of(engine_or_model: Any) -> SpectralPlugin | None:
    """The plugin attached to this engine or to its model; None if there is none."""
    reference = _plugins.get(engine_or_model)
    plugin = None if reference is None else reference()
    return plugin if plugin is not None and plugin.attached else None


def agree_on_config(source: Callable[[], Any], communicator: Communicator) -> SpectralConfig | None:
    """Read the configuration on each rank and compare by digest (collective).

    Args:
        source: gives what `load_config` reads, or None for "no section".

    Raises:
        SpectralConfigError: on every rank, if it is wrong on any or differs between them.
    """
    config: SpectralConfig | None = None
    with communicator.all_or_none():
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
