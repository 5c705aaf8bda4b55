"""Attaching, training untouched, errors on all ranks, detaching."""

import copy
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import RankError

import spectral_ds

IDENTITY = {"filter": {"response": "identity"}, "monitor": {"interval": 2}}


def train_adamw(stage, section, initialize="spectral_ds", steps=4):
    import deepspeed

    config = tiny.deepspeed_config(stage, gradient_clipping=0.5)
    if section is not None:
        config["spectral_ds"] = section
    chosen = spectral_ds.initialize if initialize == "spectral_ds" else deepspeed.initialize
    engine = tiny.make_engine(config, torch.optim.AdamW, tiny.ADAM_RATES, chosen)
    losses = tiny.train(engine, steps)
    weights = tiny.snapshot(engine)
    assert all(np.isfinite(losses))
    attached = spectral_ds.plugin_of(engine) is not None
    found = spectral_ds.plugin_of(engine.module) is spectral_ds.plugin_of(engine)
    engine.destroy()
    return losses, weights, attached, found


@pytest.mark.parametrize(
    ("section", "is_attached"),
    [
        (None, False),
        ({"enabled": False}, False),
        (IDENTITY, True),
        ({"preset": "observe"}, True),
        ({"filter": {"strength": 0.0}}, True),
    ],
)
@pytest.mark.parametrize("stage", [1, 2])
def test_without_a_filter_training_is_bitwise_that_of_deepspeed(ranks, stage, section, is_attached):
    plain = ranks(2).run(train_adamw, stage, None, "deepspeed")
    observed = ranks(2).run(train_adamw, stage, section)
    for (losses, weights, *_), (new_losses, new_weights, attached, found) in zip(
        plain, observed, strict=True
    ):
        assert attached == is_attached
        assert found
        assert losses == new_losses
        for name in weights:
            np.testing.assert_array_equal(weights[name], new_weights[name])


def detach_and_train():
    engine = tiny.make_engine({**tiny.deepspeed_config(2), "spectral_ds": {}})
    plugin = spectral_ds.plugin_of(engine)
    hooked = "_take_model_step" in vars(engine)
    plugin.detach()
    unhooked = "_take_model_step" not in vars(engine)
    tiny.train(engine)
    result = hooked, unhooked, spectral_ds.plugin_of(engine) is None, tiny.snapshot(engine)
    again = spectral_ds.attach(engine)
    again.detach()
    engine.destroy()
    return result


def train_plain():
    engine = tiny.make_engine(tiny.deepspeed_config(2))
    tiny.train(engine)
    return tiny.snapshot(engine)


def test_detach_restores_the_engine(ranks):
    plain = ranks(2).run(train_plain)[0]
    hooked, unhooked, forgotten, weights = ranks(2).run(detach_and_train)[0]
    assert (hooked, unhooked, forgotten) == (True, True, True)
    for name in plain:
        np.testing.assert_array_equal(plain[name], weights[name])


def wrap_and_detach():
    """Another tool wraps the hook after us; detaching us must not cut it off."""
    engine = tiny.make_engine({**tiny.deepspeed_config(2), "spectral_ds": {}})
    plugin, ours, calls = spectral_ds.plugin_of(engine), engine._take_model_step, []

    def theirs(*args, **kwargs):
        calls.append(1)
        return ours(*args, **kwargs)

    engine._take_model_step = theirs
    plugin.detach()
    tiny.train(engine)
    return len(calls), tiny.snapshot(engine)


def test_detach_leaves_a_later_wrapper_in_place(ranks):
    plain = ranks(2).run(train_plain)[0]
    calls, weights = ranks(2).run(wrap_and_detach)[0]
    assert calls == 1
    for name in plain:
        np.testing.assert_array_equal(plain[name], weights[name])


def attach_twice():
    engine = tiny.make_engine({**tiny.deepspeed_config(2), "spectral_ds": {}})
    spectral_ds.attach(engine)


def initialize_with(section, stage=2, changes=None):
    engine = tiny.make_engine(
        {**tiny.deepspeed_config(stage, **(changes or {})), "spectral_ds": section}
    )
    engine.destroy()


def initialize_without_torch_sparse(kernel):
    from spectral_ds.laplacian import kernels

    hidden = sys.modules.pop("torch_sparse")
    sys.modules["torch_sparse"] = None
    kernels._torch_sparse.cache_clear()
    try:
        initialize_with({"operator": {"kernel": kernel}})
    finally:
        sys.modules["torch_sparse"] = hidden
        kernels._torch_sparse.cache_clear()


def initialize_on_rank_1_with(sections):
    initialize_with(sections[dist.get_rank()])


def initialize_on_rank_1_without_section():
    config = tiny.deepspeed_config(2)
    if dist.get_rank() == 0:
        config["spectral_ds"] = {}
    tiny.make_engine(config)


def assert_every_rank_raises(outcomes, kind, *words):
    assert all(isinstance(outcome, RankError) for outcome in outcomes), outcomes
    for outcome in outcomes:
        assert outcome.kind == kind
        for word in words:
            assert word in outcome.message


def test_attaching_twice_is_an_error(ranks):
    assert_every_rank_raises(ranks(2).outcomes(attach_twice), "RuntimeError", "detach")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"filtr": {}}, ["spectral_ds.filtr", "spectral_ds.filter"]),
        ({"filter": {"order": 0}}, ["spectral_ds.filter.order", "0", "512"]),
        ({"graph": {"include": ["*.nothing.*"]}}, ["include", "*.nothing.*", "matches no"]),
        ({"graph": {"exclude": ["*embed*", "no.such"]}}, ["exclude", "no.such", "matches no"]),
        ({"graph": {"include": ["*embed*"]}}, ["no parameter is left", "*embed*"]),
        (
            {"filter": {"tau": 1e9, "response": "heat"}, "graph": {"laplacian": "combinatorial"}},
            ["filter.tolerance", "512"],
        ),
    ],
)
def test_a_wrong_section_raises_on_every_rank(ranks, section, words):
    outcomes = ranks(2).outcomes(initialize_with, section)
    assert_every_rank_raises(outcomes, "SpectralConfigError", *words)


def test_an_error_on_one_rank_raises_on_every_rank(ranks):
    sections = [{}, {"filter": {"tua": 1.0}}, {}]
    outcomes = ranks(3).outcomes(initialize_on_rank_1_with, sections)
    assert_every_rank_raises(outcomes, "SpectralConfigError", "spectral_ds.filter.tua")
    assert all("rank 1" in outcomes[rank].message for rank in (0, 2))


def test_different_configurations_raise_on_every_rank(ranks):
    sections = [{}, {"filter": {"tau": 2.0}}]
    outcomes = ranks(2).outcomes(initialize_on_rank_1_with, sections)
    assert_every_rank_raises(outcomes, "SpectralConfigError", "different configurations", "rank 1")
    outcomes = ranks(2).outcomes(initialize_on_rank_1_without_section)
    assert_every_rank_raises(outcomes, "SpectralConfigError", "no section")


def test_a_missing_torch_sparse_is_an_error_only_if_asked_for(ranks):
    outcomes = ranks(2).outcomes(initialize_without_torch_sparse, "torch_sparse")
    words = "spectral_ds.operator.kernel", "pip install --no-build-isolation", "torch_csr"
    assert_every_rank_raises(outcomes, "SpectralConfigError", *words)
    ranks(2).run(initialize_without_torch_sparse, "auto")


def initialize_from_file(path, given_as):
    model = tiny.TinyLlama()
    arguments = {
        "config": {"config": path},
        "config_params": {"config_params": path},
        "args": {"args": SimpleNamespace(deepspeed_config=path, local_rank=dist.get_rank())},
    }
    engine, optimizer, loader, scheduler = spectral_ds.initialize(
        model=model,
        model_parameters=tiny.parameter_groups(model),
        optimizer=torch.optim.SGD,
        **arguments[given_as],
    )
    assert optimizer is engine.optimizer
    assert loader is None
    assert scheduler is None
    attached = spectral_ds.plugin_of(engine) is not None
    engine.destroy()
    return attached


def micro_batch_config(section):
    config = {
        "train_micro_batch_size_per_gpu": 12,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    return config if section is None else {**config, "spectral_ds": section}


@pytest.mark.parametrize("given_as", ["config", "config_params", "args"])
def test_the_section_is_read_from_a_deepspeed_json(ranks, tmp_path, given_as):
    for section, expected in (({"preset": "observe"}, True), (None, False)):
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(micro_batch_config(section)))
        assert ranks(2).run(initialize_from_file, str(path), given_as) == [expected] * 2


def deep_copy_of_the_model_is_possible():
    engine = tiny.make_engine({**tiny.deepspeed_config(2), "spectral_ds": {}})
    copied = copy.deepcopy(engine.module)
    return spectral_ds.plugin_of(copied) is None


def test_the_model_can_be_copied_while_attached(ranks):
    assert all(ranks(2).run(deep_copy_of_the_model_is_possible))
