"""What the runner attaches to DeepSpeed engines: each once, and the newest of a module."""

import pytest
import tiny
from cells import Training

import spectral_ds
from spectral_ds.attach.runner import Runner


def watch_deepspeed(config, section, initialize_of):
    """What is attached to an engine made while a runner watches, and what was said."""
    import contextlib
    import io

    import deepspeed

    runner = Runner(None if config is None else spectral_ds.load_config(config))
    runner.watch()
    module = spectral_ds if initialize_of == "spectral_ds" else deepspeed
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            training = Training("zero2", section, initialize=module.initialize)
            plugin = spectral_ds.plugin_of(training.engine)
            response = None if plugin is None else plugin.config.filter.response
            training.step()
            runner.report()
    finally:
        runner.stop()
    detached = spectral_ds.plugin_of(training.engine) is None
    training.close()
    return response, detached, said.getvalue()


def train_in_two_phases(initialize_of):
    """Two engines of one module, one after another: whether each is attached, and its steps."""
    import deepspeed

    runner = Runner(spectral_ds.load_config(HEAT)) if initialize_of == "deepspeed" else None
    if runner is not None:
        runner.watch()
    module, found = tiny.TinyLlama(), []
    initialize = deepspeed.initialize if runner is not None else spectral_ds.initialize
    try:
        for _ in range(2):
            training = Training("zero2", HEAT, initialize=initialize, model=lambda: module)
            plugin = spectral_ds.plugin_of(training.engine)
            training.step()
            found.append((plugin is spectral_ds.plugin_of(module), plugin.engine.step))
            training.close()
    finally:
        if runner is not None:
            runner.stop()
    return found


HEAT, TIKHONOV = {"filter": {"response": "heat"}}, {"filter": {"response": "tikhonov"}}


@pytest.mark.parametrize(
    ("config", "section", "initialize_of", "response", "word"),
    [
        (None, HEAT, "deepspeed", "heat", "attached to the DeepSpeed engine of TinyLlama"),
        (None, HEAT, "spectral_ds", "heat", "attached to the DeepSpeed engine of TinyLlama"),
        (TIKHONOV, HEAT, "deepspeed", "tikhonov", "attached to"),
        (TIKHONOV, None, "deepspeed", "tikhonov", "attached to"),
        (None, None, "deepspeed", None, 'its config has no section "spectral_ds"'),
        (None, {"enabled": False}, "spectral_ds", None, "enabled: false"),
    ],
)
def test_a_deepspeed_engine_is_attached_once(ranks, config, section, initialize_of, response, word):
    for rank, (found, detached, said) in enumerate(
        ranks(2).run(watch_deepspeed, config, section, initialize_of)
    ):
        assert (found, detached) == (response, True)
        assert (word in said) == (rank == 0)
        assert said.count("spectral_ds: ") == (rank == 0)


@pytest.mark.parametrize("initialize_of", ["spectral_ds", "deepspeed"])
def test_a_second_engine_of_a_module_takes_over(ranks, initialize_of):
    for found in ranks(2).run(train_in_two_phases, initialize_of):
        assert found == [(True, 1), (True, 1)]
