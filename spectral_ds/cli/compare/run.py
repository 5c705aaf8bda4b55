"""Run: one training, through the same interface that users have.

In: a `Run`, a task and what is prepared for all runs.
Out: the trained model, and what it was on the way.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from spectral_ds.attach import attach
from spectral_ds.cli.compare.adapters import adapted
from spectral_ds.cli.compare.material import LOSS, VALIDATION, Material, Measures, Task, column
from spectral_ds.cli.compare.memory import MemoryMeter
from spectral_ds.cli.compare.optimizers import optimizers_of
from spectral_ds.cli.compare.prepare import Prepared
from spectral_ds.cli.compare.settings import Comparison, Setting
from spectral_ds.cli.errors import UserError

WARM_UP = 0.1  # of all steps: the learning rate rises, then falls linearly
LARGEST_NORM = 1.0  # that gradients are clipped to


@dataclass(frozen=True)
class Run:
    """A training: a method at one setting of its dials, a learning rate and a seed, on a task."""

    task: str
    method: str
    setting: Setting
    learning_rate: float
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from others, as columns of the results."""
        return {
            "task": self.task,
            "method": self.method,
            "setting": self.setting.name,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }

    @property
    def folder(self) -> str:
        """Its name among folders."""
        words = [self.task, self.method, self.setting.name, f"{self.learning_rate:g}", self.seed]
        return "-".join(str(word).replace(" ", "-") for word in words if word != "")


@dataclass(frozen=True)
class Point:
    """What a run was while it trained: the step, seconds of training, the validation loss."""

    step: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class Trained:
    """What a training has made.

    Attributes:
        model: with plain weights.
        best: those of the lowest validation loss, by name.
        curve: in order.
        step_seconds: of a step, the median.
        memory: bytes that training took beyond the model; None where that cannot be told.
    """

    model: nn.Module
    best: dict[str, Tensor]
    curve: list[Point]
    step_seconds: float
    memory: int | None


class Trainer:
    """Trains runs of one comparison.

    Args:
        comparison: of which they are.
        prepared: folders of the model and of statistics.
        device: to train on; on CUDA in bfloat16 where that exists.
        seed: of the runs.
    """

    def __init__(
        self, comparison: Comparison, prepared: Prepared, device: torch.device, seed: int
    ) -> None:
        self._comparison, self._prepared, self.device = comparison, prepared, device
        self.material = Material(comparison, prepared.tokenizer(), seed)

    def load(self, num_classes: int, seed: int) -> nn.Module:
        """The model before training; a new head is drawn by the seed."""
        torch.manual_seed(seed)
        model: nn.Module = self._prepared.load(num_classes).to(self.device)
        return model

    def train(self, run: Run, task: Task, measures: Measures) -> Trained:
        """Train.

        Raises:
            UserError: the method cannot be used with this model.
        """
        config, method = self._comparison.tasks[run.task], run.setting.method
        model = self.load(task.num_classes, run.seed)
        meter = MemoryMeter(self.device)
        rate = run.learning_rate * method.rate
        try:
            wrapped, unload = adapted(method.adapter, model, options_of(method, "adapter"))
            parameters = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
            optimizers = optimizers_of(
                method.optimizer, parameters, rate, options_of(method, "optimizer")
            )
        except TypeError as error:  # of a keyword that none of them has
            raise UserError(f"methods.{run.method}.options = {method.options}: {error}") from error
        schedules = [
            torch.optim.lr_scheduler.LambdaLR(each, share_of_rate(config.steps))
            for each in optimizers
        ]
        plugin = None
        if method.section is not None:
            section = self._prepared.with_files(method.section)
            section = {"monitor": {"enabled": False}, **section, "seed": run.seed}
            plugin = attach(wrapped, optimizers[0], section)
        data = task.batches(config, self._comparison.batch_size, run.seed)
        looks = {round(config.steps * (at + 1) / self._comparison.curve)
                 for at in range(self._comparison.curve)}  # fmt: skip
        curve: list[Point] = []
        best: dict[str, Tensor] = {}
        seconds: list[float] = []
        for step in range(1, config.steps + 1):
            batch = {name: each.to(self.device) for name, each in next(data).items()}
            torch.manual_seed(hash((run.seed, step)) % 2**63)  # dropout
            started = time.perf_counter()
            self._step(wrapped, batch, parameters, optimizers, plugin)
            for schedule in schedules:
                schedule.step()
            seconds.append(time.perf_counter() - started)
            if step in looks:
                loss = measures.learned(wrapped, VALIDATION)[column(VALIDATION, LOSS)]
                if not curve or loss < min(point.loss for point in curve):
                    best = {n: p.detach().clone() for n, p in wrapped.state_dict().items()}
                curve.append(Point(step, sum(seconds), loss))
        memory = meter.peak()
        if plugin is not None:
            plugin.detach()
        if method.adapter == "none":
            return Trained(wrapped, best, curve, median(seconds), memory)
        return Trained(unload(), {}, curve, median(seconds), memory)

    def _step(
        self,
        model: nn.Module,
        batch: Mapping[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
        optimizers: list[torch.optim.Optimizer],
        plugin: Any,
    ) -> None:
        model.train()
        on_gpu = self.device.type == "cuda" and torch.cuda.is_bf16_supported()
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            loss = model(**batch).loss
        loss.backward()
        if plugin is not None:
            plugin.filter_gradients()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), LARGEST_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def options_of(method: Any, whose: str) -> Mapping[str, Any]:
    """A method's options, if they are the adapter's, or else the optimizer's."""
    is_adapters = method.adapter != "none"
    found: Mapping[str, Any] = method.options
    return found if is_adapters == (whose == "adapter") else {}


def share_of_rate(steps: int) -> Callable[[int], float]:
    """The learning rate's share at each step: linearly up, then down to 0."""
    rising = max(1, round(WARM_UP * steps))

    def share(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return max(0.0, (steps - step) / max(1, steps - rising))

    return share
