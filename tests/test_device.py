"""What only shows on a device: silent steps wait for nothing and allocate nothing; exchanges there.

Where SPECTRAL_DS_DEVICE is `cuda`, these run, and so does every test of ranks: on devices.
"""

import functools

import activations
import pytest
import tiny
import torch
from cells import CELLS, Training, one_step
from expected import METHODS, expected_update, relative_error
from ranks import DEVICE

import spectral_ds

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="needs SPECTRAL_DS_DEVICE=cuda")

ENGINES = ("plain", "zero1", "zero2", "zero3", "fsdp2", "zero2-bf16", "fsdp2-bf16")
SILENT = {"monitor": {"enabled": False}, "statistics": {"interval": 1000}}
SECTIONS = {
    "depth": {**METHODS["depth-window"], **SILENT},
    "similarity": {**METHODS["similarity-heat"], **SILENT},
    "co-activation": activations.section_of({"rank": 8}, regularizer={
        "strength": 0.1, "ridge": 0.3, "coupling": "decoupled"}),
}  # fmt: skip
CALLS = ("begin_step", "before_step", "after_update")
# torch's product of a CSR matrix asks for memory of its own.
ALLOCATES = ("similarity",)


def silent_steps(name, section):
    """Allocations of each call of the plugin after some steps; a wait is an error."""
    found, watches = [], False

    def watched(call):
        @functools.wraps(call)
        def run(*arguments):
            if not watches:
                return call(*arguments)
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            torch.cuda.set_sync_debug_mode("error")
            try:
                result = call(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            found.append(torch.cuda.memory_stats()["allocation.all.allocated"] - before)
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
        watches = True
        training.train(2, first=3)
        watches = False
        training.close()
    finally:
        for call, function in usual.items():
            setattr(spectral_ds.SpectralPlugin, call, function)
    return found


@pytest.mark.parametrize("label", SECTIONS)
@pytest.mark.parametrize("name", ENGINES)
def test_a_step_that_nobody_looks_at_waits_for_nothing_and_allocates_nothing(ranks, name, label):
    [found] = ranks(1).run(silent_steps, name, SECTIONS[label])
    assert found
    if label not in ALLOCATES:
        assert set(found) == {0}


@pytest.mark.parametrize("exchange", ["boundary", "transpose"])
@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_rows_travel_between_devices(ranks, name, exchange):
    section = {
        **METHODS["depth-and-similarity-polynomial"],
        "operator": {"exchange": exchange},
        **SILENT,
    }
    (plain,) = ranks(1).run(one_step, CELLS["plain"], [None])[0]
    _, _, expected = expected_update(section, plain)
    for (found,) in ranks(2).run(one_step, CELLS[name], [section]):
        assert relative_error(found["gradients"], expected) <= 1e-5
