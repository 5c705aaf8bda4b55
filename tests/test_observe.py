"""`preset: observe`: training is bitwise unchanged, and every figure is that of the whole model."""

import re

import numpy as np
import pytest
from cells import CELLS, Training, rates_by_name

OBSERVE = {
    "preset": "observe",
    "monitor": {"interval": 1, "bands": 4},
    "statistics": {"interval": 1},
}
CASES = [
    ("plain", 1),
    ("zero1", 2),
    ("zero2", 4),
    ("zero2-offload", 3),
    ("zero3", 2),
    ("fsdp2", 4),
    ("hsdp", 4),
    ("ddp", 2),
    ("zero2-fp16", 2),
]


def two_steps(name, section):
    """Snapshots and metrics of two steps, and of what the third begins with."""
    training = Training(CELLS[name], section)
    snapshots, metrics = [training.snapshot()], []
    for index in range(3):
        training.step(index)
        snapshots.append(training.snapshot())
        if training.plugin is not None:
            metrics.append(training.plugin.metrics())
    rates = rates_by_name(training.module)
    training.close()
    return snapshots, metrics, rates


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


@pytest.mark.parametrize(("name", "world_size"), CASES)
def test_training_is_bitwise_unchanged_and_norms_are_those_of_the_whole_model(
    ranks, name, world_size
):
    plain = ranks(world_size).run(two_steps, name, None)[0]
    results = ranks(world_size).run(two_steps, name, OBSERVE)
    tolerance = 1e-4 if CELLS[name].precision == "fp32" else 2e-2
    trained = plain[2]
    before, after = plain[0][:2]
    gradients = {n: (before[n] - after[n]) / rate for n, rate in trained.items()}
    weights = {n: before[n] for n in trained}
    for snapshots, metrics, _ in results:
        for got, expected in zip(snapshots, plain[0], strict=True):
            for parameter, value in expected.items():
                np.testing.assert_array_equal(got[parameter], value)
        for tag, label_of in (("block", block_of), ("role", role_of)):
            of_gradient = norms_by(label_of, gradients)
            of_weight = norms_by(label_of, weights)
            for label, norm in of_gradient.items():
                found = metrics[0][f"gradient_norm_by_{tag}/{label}"]
                np.testing.assert_allclose(found, norm, rtol=tolerance, atol=1e-7)
                found = metrics[0][f"parameter_norm_by_{tag}/{label}"]
                np.testing.assert_allclose(found, of_weight[label], rtol=tolerance)
        whole = norms_by(lambda _: "all", gradients)["all"]
        np.testing.assert_allclose(metrics[0]["gradient_norm/all"], whole, rtol=tolerance)
        # What became of the update is known at the next step.
        assert "update_to_weight/all" not in metrics[0]


def ratios(name, section):
    """Update-to-weight ratios as written at the step after, and the snapshots around the update."""
    training = Training(CELLS[name], section)
    written = []
    training.plugin.monitor._board.scalars = written.append
    snapshots = [training.snapshot()]
    for index in range(2):
        training.step(index)
        snapshots.append(training.snapshot())
    metrics = training.plugin.metrics()
    training.close()
    return snapshots, written, metrics


@pytest.mark.parametrize(("name", "world_size"), [c for c in CASES if "fp16" not in c[0]])
def test_update_to_weight_ratio_and_noise_scale(ranks, name, world_size):
    one = ranks(1).run(ratios, "plain", OBSERVE)[0]
    for snapshots, written, metrics in ranks(world_size).run(ratios, name, OBSERVE):
        trained = [n for n in snapshots[0] if not np.array_equal(snapshots[0][n], snapshots[1][n])]
        moved = {n: snapshots[1][n] - snapshots[0][n] for n in trained}
        (late,) = [w for w in written if "update_to_weight/all" in w]
        for label, norm in norms_by(block_of, moved).items():
            weights = {
                n: v for n, v in snapshots[0].items() if block_of(n) == label and n in trained
            }
            ratio = norm / norms_by(lambda _: "all", weights)["all"]
            np.testing.assert_allclose(late[f"update_to_weight_by_block/{label}"], ratio, rtol=1e-3)
        for tag in ("signal_to_noise/total", "gradient_norm/all", "band_energy_before/0"):
            np.testing.assert_allclose(metrics[tag], one[2][tag], rtol=1e-3, atol=1e-6)
        # The noise scale is in examples where the engine knows how many a step averages over.
        in_batches = "gradient_noise_scale_in_batches"
        batch = 24 if CELLS[name].engine == "deepspeed" else 1
        scale = metrics["gradient_noise_scale" if batch > 1 else in_batches]
        np.testing.assert_allclose(scale, batch * one[2][in_batches], rtol=1e-3)
