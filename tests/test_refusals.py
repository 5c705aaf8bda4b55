"""What cannot be attached is refused on every rank, with the reason and the way out."""

import functools
from types import SimpleNamespace

import pytest
import tiny
import torch
from cells import Cell, Training
from ranks import RankError

import spectral_ds
from spectral_ds.engines import _deepspeed_engine_for


def refusals():
    """Messages of attaching to an engine with one unsupported feature after another."""
    training = Training("zero2")
    engine = training.engine
    zero = engine._config.zero_config
    changes = {
        "has_moe_layers": {"has_moe_layers": True},
        "mp_world_size": {"mp_world_size": 2},
        "mesh": {"sequence_parallel_size": 2, "mesh_device": object()},
        "zenflow": {"zenflow": True},
        "super_offload": {"super_offload": lambda: True},
        "nvme": {"zero": {"offload_optimizer": SimpleNamespace(device="nvme")}},
        "mics": {"zero": {"mics_shard_size": 2}},
        "hpz": {"zero": {"zero_hpz_partition_size": 2}},
        "deepcompile": {"compile_config": SimpleNamespace(deepcompile=True)},
        "accumulation": {"managed_gradient_accumulation": False},
        "muon": {"basic_optimizer": type("MuonWithAuxAdam", (), {})()},
        "optimizer class": {"optimizer": type("OtherOptimizer", (), {})()},
        "hook": {"_take_model_step": None},
    }
    messages = {}
    for label, change in changes.items():
        stand_in = _StandIn(engine, zero, change)
        try:
            _deepspeed_engine_for(stand_in)
        except spectral_ds.UnsupportedEngineError as error:
            messages[label] = str(error)
    training.close()
    return messages


class _StandIn:
    """A real engine, but for a few attributes."""

    def __init__(self, engine, zero, change):
        zero_change = change.pop("zero", {})
        fields = {name: getattr(zero, name) for name in type(zero).model_fields}
        self._config = SimpleNamespace(
            zero_config=SimpleNamespace(**{**fields, **zero_change}),
            compile_config=change.pop("compile_config", None),
            managed_gradient_accumulation=change.pop(
                "managed_gradient_accumulation", engine._config.managed_gradient_accumulation
            ),
        )
        self._missing = [name for name, value in change.items() if value is None]
        self._engine = engine
        self.__dict__.update({n: v for n, v in change.items() if v is not None})

    def __getattr__(self, name):
        if name in self._missing:
            raise AttributeError(name)
        return getattr(self._engine, name)


def test_unsupported_features_are_refused_with_the_reason(ranks):
    messages = ranks(2).run(refusals)[0]
    words = {
        "has_moe_layers": "mixture-of-experts",
        "mp_world_size": "tensor or model parallelism",
        "mesh": "sequence parallelism by a device mesh",
        "zenflow": "ZenFlow",
        "super_offload": "SuperOffload",
        "nvme": "NVMe",
        "mics": "MiCS",
        "hpz": "hpZ",
        "deepcompile": "DeepCompile",
        "accumulation": "managed_gradient_accumulation: false",
        "muon": "Muon",
        "optimizer class": "OtherOptimizer",
        "hook": "_take_model_step",
    }
    assert messages.keys() == words.keys()
    for label, word in words.items():
        assert word in messages[label]


def attach_stage_0_fp16():
    Training(Cell("deepspeed", 0, "fp16"), {})


def attach_fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel

    module = FullyShardedDataParallel(
        tiny.TinyLlama(), device_id=torch.device("cpu"), use_orig_params=True
    )
    spectral_ds.attach(module, torch.optim.SGD(module.parameters(), lr=1.0), {})


def attach_column_shards():
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    module = torch.nn.Linear(6, 4)
    fully_shard(module, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    spectral_ds.attach(module, torch.optim.SGD(module.parameters(), lr=1.0), {})


def attach_half_sharded():
    from torch.distributed.fsdp import fully_shard

    module = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 4))
    fully_shard(module[0])
    spectral_ds.attach(module, torch.optim.SGD(module.parameters(), lr=1.0), {})


def attach_without_optimizer():
    spectral_ds.attach(torch.nn.Linear(2, 2), config={})


def attach_another_model_on_rank_1():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3 + torch.distributed.get_rank()))
    spectral_ds.attach(module, torch.optim.SGD(module.parameters(), lr=1.0), {})


def test_different_models_raise_on_every_rank(ranks):
    for outcome in ranks(2).outcomes(attach_another_model_on_rank_1):
        assert isinstance(outcome, RankError), outcome
        assert outcome.kind == "ValueError"
        for word in ("0.weight", "(3, 2)", "(4, 2)", "rank 1"):
            assert word in outcome.message


def attach_channels_last():
    module = torch.nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
    spectral_ds.attach(module, torch.optim.SGD(module.parameters(), lr=1.0), {})


def attach_without_memory(is_sharded):
    from torch.distributed.fsdp import fully_shard

    module = torch.nn.Linear(6, 4, device="meta")
    if is_sharded:
        fully_shard(module)
    spectral_ds.attach(module, torch.optim.SGD(module.parameters(), lr=1.0), {})


def attach_foreign_optimizer():
    other = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=1.0)
    spectral_ds.attach(torch.nn.Linear(2, 2), other, {})


@pytest.mark.parametrize(
    ("attach", "words"),
    [
        (attach_stage_0_fp16, ["fp16", "stage 0", "bf16"]),
        (attach_fsdp1, ["FSDP1", "fully_shard"]),
        (attach_column_shards, ["weight", "Shard(dim=1)", "dimension 0"]),
        (attach_half_sharded, ["1.weight", "root"]),
        (attach_channels_last, ["weight", "contiguous"]),
        (functools.partial(attach_without_memory, False), ["weight", "meta", "to_empty"]),
        (functools.partial(attach_without_memory, True), ["weight", "meta", "to_empty"]),
        (attach_without_optimizer, ["a torch module needs the optimizer that trains it"]),
        (attach_foreign_optimizer, ["optimizer", "no parameter"]),
    ],
)
def test_what_cannot_be_attached_is_refused_on_every_rank(ranks, attach, words):
    for outcome in ranks(2).outcomes(attach):
        assert isinstance(outcome, RankError), outcome
        assert outcome.kind == "UnsupportedEngineError", outcome.traceback
        for word in words:
            assert word in outcome.message


def attach_a_response_without_series(part):
    """No series is close to 1/(1 + 1e12 λ): boundary rows cannot come hop by hop."""
    section = {
        "graph": {"edges": [{"family": "depth"}]},
        "filter": {"response": "window"},
        "regularizer": {"strength": 1.0},
        "operator": {"exchange": "boundary"},
    }
    section[part]["response"] = "tikhonov"
    section["filter"]["tau"] = 1e12
    Training(Cell("deepspeed", 2), section)


@pytest.mark.parametrize("part", ["filter", "regularizer"])
def test_a_response_without_series_needs_the_transpose_exchange(ranks, part):
    for outcome in ranks(2).outcomes(attach_a_response_without_series, part):
        assert isinstance(outcome, RankError), outcome
        assert outcome.kind == "SpectralConfigError", outcome.traceback
        for word in ("operator.exchange", f"{part}.response = tikhonov", "transpose"):
            assert word in outcome.message
