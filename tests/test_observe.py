"""`preset: observe`: training is bitwise unchanged, and every figure is that of the whole model."""

import functools
import re
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from cells import CELLS, Training, weights_after
from torch.utils._python_dispatch import TorchDispatchMode

BANDS = 4
OBSERVE = {
    "preset": "observe",
    "monitor": {"interval": 1, "bands": BANDS},
    "statistics": {"interval": 1},
}
# Of each case: micro-batches a step.
CASES = [
    ("plain", 1, 1),
    ("zero1", 3, 1),
    ("zero2", 2, 3),
    ("zero2-offload", 3, 1),
    ("zero3", 3, 1),
    ("zero3-offload", 2, 2),
    ("fsdp2", 2, 2),
    ("hsdp", 4, 1),
    ("ddp", 2, 1),
    ("zero2-fp16", 2, 1),
    ("zero2-bf16", 2, 1),
]


def three_steps(name, section, accumulation):
    """Snapshots around each step, metrics after it, and all that the monitor wrote."""
    training = Training(name, section, accumulation=accumulation)
    snapshots, metrics, written = [training.snapshot()], [], []
    if training.plugin is not None:
        training.plugin.monitor._board.scalars = written.append
    for index in range(3):
        training.step(index)
        snapshots.append(training.snapshot())
        if training.plugin is not None:
            metrics.append(training.plugin.metrics())
    rates = training.rates()
    training.close()
    return snapshots, metrics, written, rates


@pytest.fixture(scope="module")
def observed(ranks):
    """The same steps on every rank, observed."""
    return functools.cache(
        lambda name, size, accumulation: ranks(size).run(three_steps, name, OBSERVE, accumulation)
    )


def norms_by(label_of, values):
    """√Σ ‖x‖² of the parameters with each label."""
    found = {}
    for name, value in values.items():
        label = label_of(name)
        if label is not None:
            found[label] = found.get(label, 0.0) + float((value.astype(np.float64) ** 2).sum())
    return {label: np.sqrt(square) for label, square in found.items()}


def block_of(name):
    match = re.search(r"\.(\d+)\.", name)
    return f"{int(match.group(1)):03d}" if match else None


def role_of(name):
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


@pytest.mark.parametrize(("name", "world_size", "accumulation"), CASES)
def test_training_is_bitwise_unchanged_and_norms_are_those_of_the_whole_model(
    ranks, observed, name, world_size, accumulation
):
    plain = ranks(world_size).run(three_steps, name, None, accumulation)[0]
    results = observed(name, world_size, accumulation)
    tolerance = 1e-4 if CELLS[name].precision == "fp32" else 2e-2
    trained = plain[-1]
    before, after = plain[0][:2]
    gradients = {n: (before[n] - after[n]) / rate for n, rate in trained.items()}
    weights = {n: before[n] for n in trained}
    # Weights in bf16 round what they have moved by.
    unit = 2.0**-9 if CELLS[name].precision == "bf16" else 0.0
    rounded = {n: unit * np.maximum(abs(before[n]), abs(after[n])) / trained[n] for n in trained}
    for snapshots, metrics, *_ in results:
        for got, expected in zip(snapshots, plain[0], strict=True):
            for parameter, value in expected.items():
                np.testing.assert_array_equal(got[parameter], value)
        for tag, label_of in (("block", block_of), ("role", role_of)):
            of_gradient = norms_by(label_of, gradients)
            of_weight, slack = norms_by(label_of, weights), norms_by(label_of, rounded)
            for label, norm in of_gradient.items():
                found = metrics[0][f"gradient_norm_by_{tag}/{label}"]
                atol = slack[label] + 1e-7
                np.testing.assert_allclose(found, norm, rtol=tolerance, atol=atol)
                found = metrics[0][f"parameter_norm_by_{tag}/{label}"]
                np.testing.assert_allclose(found, of_weight[label], rtol=tolerance)
        for what, values in (("gradient_norm", gradients), ("parameter_norm", weights)):
            whole = norms_by(lambda _: "all", values)["all"]
            np.testing.assert_allclose(metrics[0][f"{what}/all"], whole, rtol=tolerance)
        # What became of the update is known at the next step.
        assert "update_to_weight/all" not in metrics[0]


@pytest.mark.parametrize(
    ("name", "world_size", "accumulation"), [c for c in CASES if CELLS[c[0]].precision == "fp32"]
)
def test_ratios_spectra_and_noise_scale_are_those_of_the_whole_model(
    observed, name, world_size, accumulation
):
    [(_, (_, alone, _), *_)] = observed("plain", 1, 1)
    bands = [f"band_energy_{when}/{b}" for when in ("before", "after") for b in range(BANDS)]
    for snapshots, (_, metrics, _), written, trained in observed(name, world_size, accumulation):
        before, after = ({n: snapshot[n] for n in trained} for snapshot in snapshots[:2])
        moved = {n: after[n] - weight for n, weight in before.items()}
        # As written at the step after; the last is of the second update.
        late, _ = [w for w in written if "update_to_weight/all" in w]
        for tag, label_of in (
            ("_by_block", block_of), ("_by_role", role_of), ("", lambda _: "all")
        ):  # fmt: skip
            norms, weights = norms_by(label_of, moved), norms_by(label_of, before)
            for label, norm in norms.items():
                found = late[f"update_to_weight{tag}/{label}"]
                np.testing.assert_allclose(found, norm / weights[label], rtol=1e-3)
        # Metrics tell of the step before what was written at this one.
        assert {n: v for n, v in metrics.items() if n.startswith("update_to_weight")} == late
        if name == "plain":  # what others are compared with
            continue
        for tag in ("signal_to_noise/total", "gradient_norm/all", "gradient_norm/before", *bands):
            np.testing.assert_allclose(metrics[tag], alone[tag], rtol=1e-3, atol=1e-6)
        # The noise scale is in examples where the engine knows how many a step averages over.
        in_batches = "gradient_noise_scale_in_batches"
        batch = 24 if CELLS[name].engine == "deepspeed" else 1
        scale = metrics["gradient_noise_scale" if batch > 1 else in_batches]
        np.testing.assert_allclose(scale, batch * alone[in_batches], rtol=1e-3)


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_observing_updates_leaves_every_bit(ranks, name):
    """By AdamW, whose updates are not the gradients."""
    section = {**OBSERVE, "filter": {"apply_to": "update"}}
    usual = ranks(2).run(weights_after, 2, name, None)[0]
    for weights in ranks(2).run(weights_after, 2, name, section):
        for parameter, value in usual.items():
            np.testing.assert_array_equal(weights[parameter], value)


SELDOM = {
    "preset": "observe",
    "monitor": {"interval": 4, "figures_interval": 4},
    "statistics": {"interval": 4},
}
COLLECTIVES = (
    "all_reduce", "all_to_all_single", "all_gather_object", "all_gather_into_tensor",
    "all_gather_single", "broadcast", "broadcast_object_list", "batch_isend_irecv", "barrier",
)  # fmt: skip
# What makes another view of memory, and neither computes nor copies.
VIEWS = ("view", "_unsafe_view", "slice", "select", "as_strided", "detach", "alias", "narrow")


class Counted(TorchDispatchMode):
    """Counts what torch is asked to do, less views."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        if name not in VIEWS:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def counting_collectives():
    """A counter of this rank's collectives."""
    counts = Counter()
    usual = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def counted(name):
        def call(*args, **kwargs):
            counts[name] += 1
            return usual[name](*args, **kwargs)

        return call

    for name in usual:
        setattr(dist, name, counted(name))
    try:
        yield counts
    finally:
        for name, function in usual.items():
            setattr(dist, name, function)


def work_of_steps(name):
    """Of each of six steps, collectives and other work inside the plugin."""
    training = Training(name, SELDOM, torch.optim.AdamW, tiny.ADAM_RATES)
    usual, steps = training.plugin.filter_gradients, []

    def counted():
        work = Counter()
        with counting_collectives() as collectives, Counted(work):
            usual()
        steps.append((dict(collectives), dict(work)))

    training.plugin.filter_gradients = counted
    for index in range(6):
        training.step(index)
    training.close()
    return steps


@pytest.mark.parametrize("name", ["zero1", "zero3", "fsdp2"])
def test_steps_that_are_not_monitored_cost_nothing(ranks, name):
    for steps in ranks(2).run(work_of_steps, name):
        for index, (collectives, work) in enumerate(steps):
            if index % 4 == 0:
                assert collectives["all_reduce"] > 1, index
            elif index % 4 == 1:  # tells how far the weights have moved
                assert collectives == {"all_reduce": 1}, index
            else:
                assert (collectives, work) == ({}, {}), index
