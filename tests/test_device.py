"""What only shows on a device: nothing is joined with what is on the host; silent steps wait for
nothing and allocate nothing; exchanges there.

On CUDA where SPECTRAL_DS_DEVICE is `cuda`; all that `cells` trains is there too then. Elsewhere on
the device of `apart`.
"""

import functools

import activations
import pytest
import tiny
import torch
from cells import CELLS, Training, one_step
from expected import METHODS, expected_update, relative_error
from ranks import device

import spectral_ds

SILENT = {"monitor": {"enabled": False}, "statistics": {"interval": 1000}}
PULL = {"strength": 0.1, "ridge": 0.3}
SECTIONS = {
    "depth": {**METHODS["depth-window"], "regularizer": PULL, **SILENT},
    "similarity": {**METHODS["similarity-heat"], **SILENT},
    "co-activation": activations.section_of(
        {"rank": 8}, regularizer={**PULL, "coupling": "decoupled"}
    ),
    "co-activation, joint": activations.section_of({"rank": 8}, regularizer=PULL),
}
CALLS = ("begin_step", "before_step", "after_update")
# torch's product of a CSR matrix asks for memory of its own.
ALLOCATES = ("similarity",)


class Watch:
    """Sees how often memory of the device is asked for, and lets nothing wait for it."""

    def __init__(self):
        if device() == "cuda":
            self.allocations = lambda: torch.cuda.memory_stats()["allocation.all.allocated"]
            self._forbid = torch.cuda.set_sync_debug_mode
        else:
            import apart

            self.allocations = apart.extension().allocations
            self._forbid = lambda mode: apart.extension().waits_are_errors(mode == "error")

    def __enter__(self):
        self._forbid("error")

    def __exit__(self, *_):
        self._forbid("default")


def silent_steps(name, section):
    """Allocations of each call of the plugin after some steps; a wait is an error."""
    found, is_watched, watch = [], False, Watch()

    def watched(call):
        @functools.wraps(call)
        def run(*arguments):
            if not is_watched:
                return call(*arguments)
            before = watch.allocations()
            with watch:
                result = call(*arguments)
            found.append(watch.allocations() - before)
            return result

        return run

    usual = {call: getattr(spectral_ds.SpectralPlugin, call) for call in CALLS}
    for call, function in usual.items():
        setattr(spectral_ds.SpectralPlugin, call, watched(function))
    try:
        training = Training(
            name, section, torch.optim.AdamW, tiny.ADAM_RATES, model=activations.CalledByIds
        )
        training.train(3)
        is_watched = True
        training.train(2, first=3)
        is_watched = False
        training.close()
    finally:
        for call, function in usual.items():
            setattr(spectral_ds.SpectralPlugin, call, function)
    return found


@pytest.mark.parametrize("label", SECTIONS)
@pytest.mark.parametrize(
    "name", ["plain", "zero1", "zero2", "zero3", "fsdp2", "zero2-bf16", "fsdp2-bf16"]
)
def test_a_step_that_nobody_looks_at_waits_for_nothing_and_allocates_nothing(devices, name, label):
    [found] = devices(1).run(silent_steps, name, SECTIONS[label])
    assert found
    if label not in ALLOCATES:
        assert set(found) == {0}


def waits_and_allocates():
    """Whether the watch sees both."""
    watch, tensor = Watch(), torch.ones(3, device=device())
    before = watch.allocations()
    tensor + 1
    with watch:
        for wait in (tensor.tolist, tensor.cpu, tensor.nonzero, lambda: tensor[tensor > 0]):
            with pytest.raises(RuntimeError):
                wait()
        tensor.mul_(2)
    return watch.allocations() - before


def test_the_watch_sees_what_waits_and_what_allocates(devices):
    assert devices(1).run(waits_and_allocates)[0] > 0


@pytest.mark.parametrize("exchange", ["boundary", "transpose"])
@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_rows_travel_between_devices(devices, name, exchange):
    section = {
        **METHODS["depth-and-similarity-polynomial"],
        "operator": {"exchange": exchange},
        **SILENT,
    }
    (plain,) = devices(1).run(one_step, CELLS["plain"], [None])[0]
    _, _, expected = expected_update(section, plain)
    for (found,) in devices(2).run(one_step, CELLS[name], [section]):
        assert relative_error(found["gradients"], expected) <= 1e-5


SEEN = {
    "monitor": {"interval": 1},
    "statistics": {"interval": 1},
    "operator": {"kernel": "torch_csr"},
}
BUSY = {
    "stack": {
        "graphs": [
            {"node": "row", "edges": [{"family": "similarity", "neighbours": 3}]},
            {"node": "column", "edges": [{"family": "ring"}, {"family": "pair"}]},
        ],
        "filter": {"response": "heat", "rescale": "norm", "temporal": {"amplify": 0.5}},
        "regularizer": {"strength": 0.01, "reference_device": "cpu"},
        **SEEN,
    },
    "similar gradients": {
        "graph": {
            "node": "column",
            "edges": [{"family": "similarity", "features": "gradient"}],
            "refresh_interval": 2,
        },
        "filter": {"response": "wiener"},
        "regularizer": {"strength": 0.1, "coupling": "decoupled"},
        **SEEN,
    },
    "co-activation": activations.section_of(
        {"rank": 8, "learn": "training", "samples": 4},
        regularizer={"strength": 0.1, "reference_device": "cpu"},
        **SEEN,
    ),
}


def busy_steps(name, section, folder):
    """Weights after steps that use all there is, and the plugin's figures of the last of them."""
    drawn = 2 if name == "plain" else 100  # those of the first step are drawn everywhere
    monitor = {**section["monitor"], "figures_interval": drawn, "folder": f"{folder}/events"}
    section = {**section, "monitor": monitor}
    training = Training(name, section, rates=(0.05, 0.02), model=activations.CalledByIds)
    training.train(2)
    training.plugin.save(f"{folder}/state")
    training.plugin.load(f"{folder}/state")
    training.train(2, first=2)
    metrics, weights = training.plugin.metrics(), training.snapshot()
    training.close()
    return weights, {key: value for key, value in metrics.items() if "seconds" not in key}


@pytest.mark.parametrize(("name", "label"), [
    *(("plain", label) for label in BUSY),
    ("zero2", "co-activation"),
    ("zero2-offload", "stack"),
    ("zero3-offload", "similar gradients"),
    ("fsdp2-offload", "co-activation"),
    ("fsdp2", "stack"),
    ("ddp", "similar gradients"),
])  # fmt: skip
def test_training_there_is_training_here(ranks, devices, name, label, tmp_path):
    world_size = 1 if name == "plain" else 2
    here, there = (
        pool(world_size).run(busy_steps, name, BUSY[label], str(tmp_path / where))
        for where, pool in (("here", ranks), ("there", devices))
    )
    for (weights, metrics), (expected, wanted) in zip(there, here, strict=True):
        assert relative_error(weights, expected) <= 1e-5
        assert metrics.keys() == wanted.keys()
        for key, value in metrics.items():
            assert value == pytest.approx(wanted[key], rel=1e-2, abs=1e-6), key
    assert list((tmp_path / "there").rglob("events*"))
