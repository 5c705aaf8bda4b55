"""Attaching, training untouched, errors on all ranks, detaching."""

import copy
import json
import sys
from types import SimpleNamespace

import deepspeed
import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from cells import Training
from ranks import RankError

import spectral_ds

IDENTITY = {"filter": {"response": "identity"}, "monitor": {"interval": 2}}


def train_adamw(section, initialize=spectral_ds.initialize):
    training = Training(
        "zero2", section, torch.optim.AdamW, tiny.ADAM_RATES, clipping=0.5, initialize=initialize
    )
    losses = training.train(4)
    weights = training.snapshot()
    assert all(np.isfinite(losses))
    plugin = spectral_ds.plugin_of(training.engine)
    found = spectral_ds.plugin_of(training.module) is plugin
    training.close()
    return losses, weights, plugin is not None, found


@pytest.fixture(scope="module")
def by_deepspeed_alone(ranks):
    return ranks(2).run(train_adamw, None, deepspeed.initialize)


@pytest.mark.parametrize(
    ("section", "is_attached"),
    [
        (None, False),
        ({"enabled": False}, False),
        (IDENTITY, True),
        ({"filter": {"strength": 0.0}}, True),
    ],
)
def test_without_a_filter_training_is_bitwise_that_of_deepspeed(
    ranks, by_deepspeed_alone, section, is_attached
):
    plain, observed = by_deepspeed_alone, ranks(2).run(train_adamw, section)
    for (losses, weights, *_), (new_losses, new_weights, attached, found) in zip(
        plain, observed, strict=True
    ):
        assert attached == is_attached
        assert found
        assert losses == new_losses
        for name in weights:
            np.testing.assert_array_equal(weights[name], new_weights[name])


def detach_and_train():
    training = Training("zero2", {})
    engine = training.engine
    hooked = "_take_model_step" in vars(engine)
    training.plugin.detach()
    unhooked = "_take_model_step" not in vars(engine)
    training.step()
    result = hooked, unhooked, spectral_ds.plugin_of(engine) is None, training.snapshot()
    again = spectral_ds.attach(engine)
    again.detach()
    training.close()
    return result


def train_plain():
    training = Training("zero2")
    training.step()
    return training.snapshot()


def test_detach_restores_the_engine(ranks):
    plain = ranks(2).run(train_plain)[0]
    hooked, unhooked, forgotten, weights = ranks(2).run(detach_and_train)[0]
    assert (hooked, unhooked, forgotten) == (True, True, True)
    for name in plain:
        np.testing.assert_array_equal(plain[name], weights[name])


def wrap_and_detach():
    """Another tool wraps the hook after us; detaching us must not cut it off."""
    training = Training("zero2", {})
    engine, calls = training.engine, []
    ours = engine._take_model_step

    def theirs(*args, **kwargs):
        calls.append(1)
        return ours(*args, **kwargs)

    engine._take_model_step = theirs
    training.plugin.detach()
    training.step()
    return len(calls), training.snapshot()


def test_detach_leaves_a_later_wrapper_in_place(ranks):
    plain = ranks(2).run(train_plain)[0]
    calls, weights = ranks(2).run(wrap_and_detach)[0]
    assert calls == 1
    for name in plain:
        np.testing.assert_array_equal(plain[name], weights[name])


def attach_twice():
    spectral_ds.attach(Training("zero2", {}).engine)


def initialize_with(section):
    Training("zero2", section).close()


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
    Training("zero2", {} if dist.get_rank() == 0 else None)


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
    ranks(2).run(initialize_without_torch_sparse, "best")


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
    copied = copy.deepcopy(Training("zero2", {}).module)
    return spectral_ds.plugin_of(copied) is None


def test_the_model_can_be_copied_while_attached(ranks):
    assert all(ranks(2).run(deep_copy_of_the_model_is_possible))


def test_what_ranks_agree_on_travels_by_their_own_devices(monkeypatch):
    module, chosen, worlds = sys.modules["spectral_ds.attach.initialize"], [], []
    accelerator = SimpleNamespace(
        communication_backend_name=lambda: "nccl",
        set_device=chosen.append,
        current_device_name=lambda: f"cuda:{chosen[-1]}",
    )
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: accelerator)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setattr(module, "Communicator", lambda group, device: str(device))
    monkeypatch.setattr(module, "agree_on_config", lambda source, world: worlds.append(world))
    monkeypatch.setenv("LOCAL_RANK", "1")
    for args in (None, SimpleNamespace(device_rank=3)):
        module.check_section(deepspeed.initialize, (args,), {"config": {}})
    assert worlds == ["cuda:1", "cuda:3"]
