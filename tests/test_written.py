"""What the monitor writes, and where: after overflows and rollbacks, to W&B, and to nowhere."""

import importlib.machinery
import logging
import sys
import types

import numpy as np
import pytest
import tiny
import torch
from cells import Training
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import spectral_ds

BANDS, STEPS, FIGURES_INTERVAL = 4, 5, 3
OBSERVE = {
    "preset": "observe",
    "monitor": {"interval": 1, "figures_interval": FIGURES_INTERVAL, "bands": BANDS},
    "statistics": {"interval": 1},
}


def overflowing(folder):
    """A run whose loss scale is too large at first: no float16 holds it.

    Returns:
        Skipped steps; metrics of the last one; whether the weights are finite, and have moved.
    """
    training = Training(
        "zero2",
        OBSERVE,
        torch.optim.AdamW,
        tiny.ADAM_RATES,
        tensorboard={"enabled": True, "output_path": folder, "job_name": "run"},
        fp16={"enabled": True, "initial_scale_power": 20, "hysteresis": 1},
    )
    before = training.snapshot()
    training.train(STEPS)
    after = training.snapshot()
    skipped, metrics = training.engine.skipped_steps, training.plugin.metrics()
    training.close()
    is_finite = all(np.isfinite(weight).all() for weight in after.values())
    return skipped, metrics, is_finite, any((after[n] != w).any() for n, w in before.items())


def test_after_an_overflow_only_finite_scalars_are_written_and_the_run_goes_on(ranks, tmp_path):
    for skipped, metrics, is_finite, has_moved in ranks(2).run(overflowing, str(tmp_path)):
        assert 0 < skipped < STEPS
        assert is_finite
        assert has_moved
        assert np.isfinite(list(metrics.values())).all()
    [file] = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    for tag in tags["scalars"]:
        assert all(np.isfinite(s.value) for s in events.Scalars(tag)), tag
    assert len(events.Scalars("spectral_ds/gradient_norm/all")) == STEPS - skipped
    assert len(events.Scalars("spectral_ds/nodes")) == STEPS
    for name in ("energy", "gradient_norm_by_block_and_role", "density_of_states"):
        steps = [image.step for image in events.Images(f"spectral_ds/{name}")]
        drawn = range(0, STEPS, FIGURES_INTERVAL)
        assert steps == [(step + 1) * tiny.GLOBAL_BATCH for step in drawn], name


class Run:
    """A small model that trains alone on batches by number, and what its monitor writes."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.Linear(20, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        section = {**OBSERVE, "graph": {"edges": [{"family": "ring"}]}}
        section["monitor"] = {"interval": 2, "bands": BANDS}
        self.plugin = spectral_ds.attach(self.model, self.optimizer, section)
        self.written = []
        self.plugin.monitor._board.scalars = self.written.append

    def step(self, number):
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
        (self.model(inputs) + 1).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def load(self, weights, folder):
        self.model.load_state_dict(weights)
        self.plugin.load(folder)

    def of(self, tag):
        return [metrics[tag] for metrics in self.written if tag in metrics]


def test_a_run_that_is_rolled_back_writes_what_a_new_process_would(tmp_path):
    rolled = Run()
    for number in range(4):
        rolled.step(number)
    weights = {name: weight.clone() for name, weight in rolled.model.state_dict().items()}
    rolled.plugin.save(tmp_path)
    with torch.no_grad():  # away from there
        for parameter in rolled.model.parameters():
            parameter.add_(1.0)
    rolled.step(10)  # monitored, so that the next step would tell how far weights have moved
    rolled.written.clear()
    fresh = Run()
    for run in (rolled, fresh):
        run.load(weights, tmp_path)
        run.step(4)
        assert run.of("update_to_weight/all") == []
        for number in (5, 6, 7):
            run.step(number)
    ratios, scales = "update_to_weight/all", "gradient_noise_scale_in_batches"
    assert len(fresh.of(ratios)) == len(fresh.of(scales)) == 2
    assert rolled.of(ratios) == fresh.of(ratios)
    assert rolled.of(scales) == fresh.of(scales)


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def said_at_attach(folder):
    """By case, how often it was said that nothing is written, at attach and a step after."""
    monitor = {"interval": 1, "bands": BANDS}
    quiet = {"preset": "observe", "monitor": {**monitor, "enabled": False}}
    loud = {"preset": "observe", "monitor": monitor}
    kept = {"preset": "observe", "monitor": {**monitor, "folder": f"{folder}/own"}}
    board = {"enabled": True, "output_path": folder, "job_name": "run"}
    cases = {
        "ddp, nothing": lambda: Training("ddp", loud),
        "ddp, off": lambda: Training("ddp", quiet),
        "ddp, folder": lambda: Training("ddp", kept),
        "zero2, nothing": lambda: Training("zero2", loud),
        "zero2, off": lambda: Training("zero2", quiet),
        "zero2, csv": lambda: Training("zero2", loud, csv_monitor=board),
    }
    found = {}
    for name, start in cases.items():
        heard = Heard()
        logger = logging.getLogger("spectral_ds")
        logger.addHandler(heard)
        training = start()
        training.step()
        logger.removeHandler(heard)
        training.close()
        found[name] = sum("is written nowhere" in line for line in heard.said)
    return found


def test_it_is_said_once_that_what_is_monitored_is_written_nowhere(ranks, tmp_path):
    first, second = ranks(2).run(said_at_attach, str(tmp_path))
    assert {name for name, count in first.items() if count} == {"ddp, nothing", "zero2, nothing"}
    assert set(first.values()) == {0, 1}
    assert set(second.values()) == {0}


def test_a_writer_of_the_users_is_somewhere(caplog):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for writer, is_said in ((None, True), (types.SimpleNamespace(), False)):
        caplog.clear()
        with caplog.at_level("INFO", logger="spectral_ds"):
            section = {"preset": "observe"}
            spectral_ds.attach(model, optimizer, section, writer=writer).detach()
        assert ("is written nowhere" in caplog.text) == is_said


def to_wandb():
    """What a stand-in for the package `wandb` is given in three steps."""
    logged = []
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init = lambda **settings: None
    module.log = lambda data, step=None, **settings: logged.append((step, dict(data)))
    usual = sys.modules.get("wandb")
    sys.modules["wandb"] = module
    try:
        section = {"preset": "observe", "monitor": {"interval": 2, "bands": BANDS}}
        wandb = {"enabled": True}
        training = Training("zero2", section, torch.optim.AdamW, tiny.ADAM_RATES, wandb=wandb)
        training.train(3)
        metrics = training.plugin.metrics()
        training.close()
    finally:
        del sys.modules["wandb"]
        if usual is not None:
            sys.modules["wandb"] = usual
    return logged, metrics


def test_scalars_join_deepspeeds_own_in_wandb(ranks):
    (logged, metrics), (others, _) = ranks(2).run(to_wandb)
    assert others == []
    for tag in ("nodes", "gradient_norm/all", "band_energy_before/0"):
        found = [
            (step, data[f"spectral_ds/{tag}"])
            for step, data in logged
            if f"spectral_ds/{tag}" in data
        ]
        assert [step for step, _ in found] == [tiny.GLOBAL_BATCH, 3 * tiny.GLOBAL_BATCH]
        assert found[-1][1] == pytest.approx(metrics[tag])
    assert any("Train/Samples/lr" in data for _, data in logged)
    # W&B leaves out what comes with a smaller step than it has seen.
    assert [step for step, _ in logged] == sorted(step for step, _ in logged)
