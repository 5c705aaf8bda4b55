"""Material: the examples that a run learns from, and what models are measured on.

What is held out is the same for all methods, and for all seeds or drawn by each: of each task some
examples to choose by and some to report, of general texts likewise. What is trained on is drawn by
the seed.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectral_ds.cli import knowledge
from spectral_ds.cli.compare.settings import Comparison, TaskConfig
from spectral_ds.cli.errors import UserError
from spectral_ds.cli.examples import (
    Batch,
    Corpus,
    batches,
    classification_examples,
    language_modelling_examples,
    load_corpus,
)
from spectral_ds.text import DataError, read_texts

# What is the same for all seeds is drawn by it.
SAME_SEED = 0
# Parts of what is held out.
TEST, VALIDATION = "test", "validation"
# What a model has learned, and forgotten: of each part.
LOSS, ACCURACY, FORGETTING, DIVERGENCE = "loss", "accuracy", "forgetting", "divergence"


def column(part: str, what: str, of: str = "") -> str:
    """The name of a measure: of a part of what is held out, and of a general text."""
    return ".".join(filter(None, (part, what, of)))


@dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
        training: all examples that may be trained on.
        collate: makes a batch of some.
        num_classes: 0 for language models.
        held_out: by part, token ids.
        labels: likewise, classes; None for language models.
    """

    training: Sequence[Any]
    collate: Callable[[Sequence[Any]], Batch]
    num_classes: int
    held_out: dict[str, list[list[int]]]
    labels: dict[str, Tensor] | None

    def batches(self, config: TaskConfig, batch_size: int, seed: int) -> Iterator[Batch]:
        """Batches for ever, of the examples that a seed draws.

        Raises:
            DataError: there are not enough for one batch.
        """
        return self._batches(self._drawn(config, seed), self.collate, batch_size, seed)

    def trained_ids(self, config: TaskConfig, batch_size: int, seed: int) -> list[list[int]]:
        """Token ids of the examples in the batches of a run, each once."""
        drawn = self._drawn(config, seed)
        numbers = self._batches(range(len(drawn)), list, batch_size, seed)
        used = {n for batch in itertools.islice(numbers, config.steps) for n in batch}
        chosen = [drawn[number] for number in sorted(used)]
        return [each.tolist() if self.labels is None else each[0] for each in chosen]

    @staticmethod
    def _batches(
        examples: Sequence[Any], collate: Callable[[Sequence[Any]], Any], size: int, seed: int
    ) -> Iterator[Any]:
        size = min(size, len(examples))
        return batches(examples, collate, batch_size=size, rank=0, world_size=1, seed=seed)

    def _drawn(self, config: TaskConfig, seed: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.training), generator=generator).tolist()
        if config.per_class:
            left = dict.fromkeys(range(self.num_classes), config.per_class)
            found = []
            for at in order:
                label = self.training[at][1]
                if left[label]:
                    left[label] -= 1
                    found.append(self.training[at])
            return found
        return [self.training[at] for at in order[: config.examples or None]]


class Material:
    """All texts of a comparison as one tokenizer reads them.

    Args:
        comparison: says which.
        tokenizer: of the model.
        seed: of a run; it draws what is held out, if each seed does.

    Raises:
        UserError: a file cannot be used, or is too short.
    """

    def __init__(self, comparison: Comparison, tokenizer: Any, seed: int) -> None:
        self._comparison, self._tokenizer = comparison, tokenizer
        self._seed = seed if comparison.held_out == "by_seed" else SAME_SEED
        self._classifies = comparison.kind == "classification"
        self.general = {name: self._general(name) for name in comparison.general}

    def task(self, name: str) -> Task:
        """A task's examples."""
        c, config = self._comparison, self._comparison.tasks[name]
        path = Path(config.data)
        make = classification_examples if self._classifies else language_modelling_examples
        try:
            corpus = load_corpus(path, labelled=self._classifies)
            examples = make(
                corpus, self._tokenizer, c.sequence_length, num_held_out=c.test + c.validation,
                seed=self._seed,
            )  # fmt: skip
        except DataError as error:
            raise UserError(f"tasks.{name}.data = {path}: {error}") from error
        key = f"tasks.{name}"
        if config.per_class:
            classes = Counter(label for _, label in examples.training)
            fewest = min(classes[label] for label in set(corpus.labels or ()))
            _require(
                f"{key}.per_class", config.per_class, fewest, "of the rarest class, not held out"
            )
        else:
            _require(f"{key}.examples", config.examples, len(examples.training), "not held out")
        parts = {TEST: examples.held_out[: c.test], VALIDATION: examples.held_out[c.test :]}
        if not self._classifies:
            held_out = {part: [each.tolist() for each in held] for part, held in parts.items()}
            return Task(examples.training, examples.collate, 0, held_out, None)
        by_length = {p: sorted(held, key=lambda pair: len(pair[0])) for p, held in parts.items()}
        return Task(
            examples.training,
            examples.collate,
            corpus.num_classes,
            {part: [ids for ids, _ in held] for part, held in by_length.items()},
            {part: torch.tensor([y for _, y in held]) for part, held in by_length.items()},
        )

    def _general(self, name: str) -> dict[str, list[list[int]]]:
        """Texts by part, as token ids."""
        config, length = self._comparison.general[name], self._comparison.sequence_length
        path, wanted = Path(config.data), 2 * config.texts
        try:
            texts = read_texts(path)
            if self._classifies:
                generator = torch.Generator().manual_seed(self._seed)
                order = torch.randperm(len(texts), generator=generator)[:wanted].tolist()
                encoded = self._tokenizer(
                    [texts[at] for at in order], truncation=True, max_length=length
                )["input_ids"]
            else:
                cut = language_modelling_examples(
                    Corpus(texts, None, 0), self._tokenizer, length, num_held_out=0,
                    seed=self._seed,
                )  # fmt: skip
                encoded = [each.tolist() for each in cut.training[:wanted]]
        except DataError as error:
            raise UserError(f"general.{name}.data = {path}: {error}") from error
        fewest = 2 * (knowledge.NEIGHBOURS + 1) if self._classifies else 2
        if len(encoded) < fewest:
            raise UserError(f"general.{name}.data = {path}: {len(encoded)} texts are too few")
        _require(
            f"general.{name}.texts", config.texts, len(encoded) // 2, "to choose by and to report"
        )
        half = len(encoded) // 2
        return {
            TEST: sorted(encoded[:half], key=len),
            VALIDATION: sorted(encoded[half : 2 * half], key=len),
        }


def _require(key: str, wanted: int, found: int, what: str) -> None:
    """Refuse to measure less than is asked for and said."""
    if found < wanted:
        raise UserError(f"{key} = {wanted}: there are only {found} {what}")


class Measures:
    """What models have learned and forgotten.

    Args:
        task: that is learned.
        general: of `Material`.
        before: the model before training, which does not change from now on.
    """

    def __init__(
        self, task: Task, general: dict[str, dict[str, list[list[int]]]], before: nn.Module
    ) -> None:
        self._task, self._general = task, general
        self._neighbours: dict[tuple[str, str], Tensor] = {}
        self._beliefs: dict[tuple[str, str], knowledge.Beliefs] = {}
        self._loss: dict[tuple[str, str], float] = {}
        for name, parts in general.items():
            for part, texts in parts.items():
                if self._classifies:
                    self._neighbours[name, part] = knowledge.neighbours_of(before, texts)
                    continue
                self._beliefs[name, part] = beliefs = knowledge.Beliefs(before, texts)
                self._loss[name, part], _ = knowledge.loss_and_divergence(beliefs, before)

    @property
    def _classifies(self) -> bool:
        return self._task.labels is not None

    def learned(self, model: nn.Module, part: str) -> dict[str, float]:
        """Loss, and accuracy if the model classifies, on one part of the task."""
        texts = self._task.held_out[part]
        if self._task.labels is None:
            return {column(part, LOSS): knowledge.loss_on(model, texts)}
        labels, scores = self._task.labels[part], knowledge.class_scores(model, texts)
        right = scores.argmax(1) == labels
        return {
            column(part, LOSS): float(functional.cross_entropy(scores, labels)),
            column(part, ACCURACY): float(right.double().mean()),
        }

    def all(self, model: nn.Module) -> dict[str, float]:
        """Everything, of all parts.

        Forgetting is, to classify, the share of nearest neighbours of general texts that are no
        longer the same; else by how much the loss on them has grown. It is the mean of all kinds of
        general text, and of each on the part to report. The divergence is KL(before || now).
        """
        found: dict[str, float] = {}
        for part in (VALIDATION, TEST):
            found |= self.learned(model, part)
            of_texts = {name: self._of_texts(model, name, part) for name in self._general}
            found[column(part, FORGETTING)] = _mean(each[FORGETTING] for each in of_texts.values())
            if part == TEST:
                for name, each in of_texts.items():
                    found[column(part, FORGETTING, name)] = each[FORGETTING]
            if not self._classifies:
                apart = _mean(each[DIVERGENCE] for each in of_texts.values())
                found[column(part, DIVERGENCE)] = apart
        return found

    def _of_texts(self, model: nn.Module, name: str, part: str) -> dict[str, float]:
        """What is forgotten of general texts, and of a language model the divergence."""
        if self._classifies:
            texts = self._general[name][part]
            now = knowledge.neighbours_of(model, texts)
            return {FORGETTING: 1 - knowledge.share_kept(self._neighbours[name, part], now)}
        loss, apart = knowledge.loss_and_divergence(self._beliefs[name, part], model)
        return {FORGETTING: loss - self._loss[name, part], DIVERGENCE: apart}


def _mean(values: Any) -> float:
    held = list(values)
    return float(sum(held) / len(held))
