"""Job: one run and all that is measured of it, in a process of its own.

Sends rows as soon as they are known. A run that methods start from leaves its model in the folder
`runs`, so that another method, later, need not train it again.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from spectral_ds.cli.compare.adapters import head_names
from spectral_ds.cli.compare.after import (
    Merge,
    interpolate,
    share_by_depth,
    write_texts,
)
from spectral_ds.cli.compare.material import Measures, Task
from spectral_ds.cli.compare.prepare import Prepared
from spectral_ds.cli.compare.results import Row
from spectral_ds.cli.compare.run import Run, Trained, Trainer
from spectral_ds.cli.compare.settings import Comparison, Setting

# Sends what is found: the name of a table, and rows of it.
Tell: TypeAlias = Callable[[str, list[Row]], None]
RESULTS, CURVES = "results", "curves"


@dataclass(frozen=True)
class Job:
    """A run, and what of it is not known yet.

    Attributes:
        run: the training.
        alphas: of interpolations; 1 is the run itself.
        after: settings of methods that start from it, by name, and their interpolations.
        keeps_model: whether its model is to be kept for such methods.
    """

    run: Run
    alphas: tuple[float, ...]
    after: Mapping[str, Sequence[tuple[Setting, tuple[float, ...]]]]
    keeps_model: bool

    @property
    def rows(self) -> int:
        after = (alphas for settings in self.after.values() for _, alphas in settings)
        return len(self.alphas) + sum(map(len, after))


@dataclass(frozen=True)
class Workplace:
    """What all jobs of a comparison share."""

    comparison: Comparison
    prepared: Prepared
    out: Path
    device: str
    threads: int


def work(job: Job, place: Workplace, tell: Tell) -> None:
    """Train and measure."""
    torch.set_num_threads(place.threads)
    device, seed = torch.device(place.device), job.run.seed
    trainer = Trainer(place.comparison, place.prepared, device, seed)
    task = trainer.material.task(job.run.task)
    before = trainer.load(task.num_classes, seed)
    _Work(job, place, trainer, task, before, tell).do()


class _Work:
    def __init__(
        self, job: Job, place: Workplace, trainer: Trainer, task: Task, before: Any, tell: Tell
    ) -> None:
        self._job, self._place, self._trainer, self._task = job, place, trainer, task
        self._tell = tell
        self._measures = Measures(task, trainer.material.general, before)
        self._before = {name: p.detach() for name, p in before.named_parameters()}
        self._heads = head_names(before)
        self._folder = place.out / "runs" / job.run.folder

    def do(self) -> None:
        job = self._job
        model = self._trained_before() if self._is_kept else None
        if model is None:
            model = self._train()
        after = _weights(model)
        self._report(job.run.key, job.alphas, model, after)
        for name, settings in job.after.items():
            for setting, alphas in settings:
                made = self._made(setting, model, after)
                key = job.run.key | {"method": name, "setting": setting.name}
                self._report(key, alphas, made, _weights(made))

    # The model of the run

    @property
    def _is_kept(self) -> bool:
        return (self._folder / "cost.pt").exists()

    def _trained_before(self) -> nn.Module:
        self._cost = torch.load(self._folder / "cost.pt", weights_only=True)
        model: nn.Module = self._trainer.load(self._task.num_classes, self._job.run.seed)
        kept = self._place.prepared.load(self._task.num_classes, self._folder / "model")
        model.load_state_dict(kept.state_dict())
        return model

    def _train(self) -> nn.Module:
        run = self._job.run
        trained = self._trainer.train(run, self._task, self._measures)
        self._tell(CURVES, [
            run.key | {"step": p.step, "seconds": p.seconds, "loss": p.loss} for p in trained.curve
        ])  # fmt: skip
        self._cost = {
            "seconds": trained.curve[-1].seconds,
            "step_seconds": trained.step_seconds,
            "memory": trained.memory,
        }
        if self._job.keeps_model:
            self._keep(trained)
        return trained.model

    def _keep(self, trained: Trained) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        model: Any = trained.model
        tokenizer = self._place.prepared.tokenizer()
        model.save_pretrained(self._folder / "model")
        tokenizer.save_pretrained(self._folder / "model")
        torch.save(trained.best, self._folder / "best.pt")
        run, comparison = self._job.run, self._place.comparison
        task = comparison.tasks[run.task]
        seen = self._task.trained_ids(task, comparison.batch_size, run.seed)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in seen]
        write_texts(self._folder / "training.jsonl", texts)
        torch.save(self._cost, self._folder / "cost.pt")  # last: all is there

    # What is made of it

    def _made(self, setting: Setting, model: nn.Module, after: Mapping[str, Tensor]) -> nn.Module:
        """What a method has made of the change; maybe in the memory of `model`."""
        method = setting.method
        if method.by == "by_depth":
            interpolate(model, self._before, after, share_by_depth(model, **method.options))
            return model
        if method.by == "early_stopping":
            best = torch.load(self._folder / "best.pt", weights_only=True)
            model.load_state_dict(best)
            return model
        merge = Merge(self._place.prepared, self._folder / "model", self._folder / "training.jsonl")
        return merge.model(method.options, self._task.num_classes).to(self._trainer.device)

    def _report(
        self, key: Row, alphas: Sequence[float], model: nn.Module, after: Mapping[str, Tensor]
    ) -> None:
        """Measure W₀ + α ΔW of each α, in the memory of `model`."""
        for alpha in alphas:
            interpolate(model, self._before, after, lambda _, alpha=alpha: alpha)
            row = key | {"alpha": alpha} | self._cost | {"perturbation": self._perturbation(model)}
            self._tell(RESULTS, [row | self._measures.all(model)])

    def _perturbation(self, model: nn.Module) -> float:
        squares = [
            (parameter.detach() - self._before[name]).double().square().sum()
            for name, parameter in model.named_parameters()
            if name not in self._heads
        ]
        return float(torch.stack(squares).sum().sqrt())


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
