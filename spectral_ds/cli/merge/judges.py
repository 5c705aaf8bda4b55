"""Judges: how well a model does on texts, and how much it has changed on others.

For a causal language model both are losses, in nats a token. For a classifier of sequences the
first is the loss, with the accuracy; the second is of how many texts the nearest neighbours are no
longer the base model's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional

from spectral_ds.cli.errors import UserError
from spectral_ds.cli.knowledge import (
    NEIGHBOURS,
    class_scores,
    loss_on,
    neighbours_of,
    share_kept,
)
from spectral_ds.cli.merge.looking import SEED, Amount
from spectral_ds.cli.models import CAUSAL
from spectral_ds.text import (
    DataError,
    Text,
    begin_of,
    encoded,
    pieces_of,
    read_labelled_texts,
    read_learnable,
)

T = TypeVar("T")

CLASSIFIER = "ForSequenceClassification"
# Texts of the second half, in turn: statistics of the same file are of the first.
HELD_OUT = 1


@dataclass(frozen=True)
class Judgement:
    """Of a model.

    Attributes:
        task: loss on the task's texts, nats.
        accuracy: share of the task's labels; None without labels.
        general: loss on general texts, or the share of neighbours kept.
        forgetting: by how much general knowledge is worse than the base model's.
    """

    task: float
    accuracy: float | None
    general: float
    forgetting: float


# Judges a model; the first that it is called with is the base model.
Judge = Callable[[nn.Module], Judgement]


def judge_for(
    model: nn.Module, task: Path, general: Path, tokenizer: Any, amount: Amount
) -> tuple[Judge, str]:
    """The judge of a model's kind, and what its `general` is.

    Raises:
        UserError: there is none, or texts cannot be used.
    """
    name = type(model).__name__
    longest = getattr(model.config, "max_position_embeddings", None)
    length = amount.length if longest is None else min(amount.length, longest)
    if name.endswith(CAUSAL):
        texts = [
            _pieces(_texts(path, option), tokenizer, amount.samples, length, f"{option} {path}")
            for path, option in ((task, "--task"), (general, "--general"))
        ]
        return _LanguageModels(*texts), "loss on general texts"
    if name.endswith(CLASSIFIER):
        rows = _drawn(_labelled(task, model), amount.samples)
        others = _drawn(_texts(general, "--general"), amount.samples)
        return (
            _Classifiers(
                encoded([text for text, _ in rows], tokenizer, length),
                [label for _, label in rows],
                _encoded(others, tokenizer, length, f"--general {general}"),
                str(general),
            ),
            f"share kept of each general text's {NEIGHBOURS} nearest neighbours",
        )
    raise UserError(f"--sweep judges causal language models and classifiers, and this is {name}")


class _LanguageModels:
    def __init__(self, task: list[list[int]], general: list[list[int]]) -> None:
        self._task, self._general = task, general
        self._of_base: float | None = None

    def __call__(self, model: nn.Module) -> Judgement:
        general = loss_on(model, self._general)
        if self._of_base is None:
            self._of_base = general
        return Judgement(loss_on(model, self._task), None, general, general - self._of_base)


class _Classifiers:
    def __init__(
        self, task: list[list[int]], labels: list[int], general: list[list[int]], path: str
    ) -> None:
        if len(general) <= NEIGHBOURS:
            raise UserError(f"--general {path}: {len(general)} texts of the held-out half are few")
        self._task, self._labels, self._general = task, torch.tensor(labels), general
        self._of_base: torch.Tensor | None = None

    def __call__(self, model: nn.Module) -> Judgement:
        scores = class_scores(model, self._task)
        loss = float(functional.cross_entropy(scores, self._labels))
        accuracy = float((scores.argmax(1) == self._labels).double().mean())
        nearest = neighbours_of(model, self._general)
        if self._of_base is None:
            self._of_base = nearest
        kept = share_kept(self._of_base, nearest)
        return Judgement(loss, accuracy, kept, 1 - kept)


def _texts(path: Path, option: str) -> list[Text]:
    try:
        return read_learnable(path)[HELD_OUT::2]
    except DataError as error:
        raise UserError(f"{option} {path}: {error}") from error


def _labelled(path: Path, model: nn.Module) -> list[tuple[str, int]]:
    """Held-out texts and their labels, as the model numbers them."""
    try:
        rows = read_labelled_texts(path)[HELD_OUT::2]
    except DataError as error:
        raise UserError(f"--task {path}: {error}") from error
    config: Any = model.config
    numbers: dict[str, int] = {str(i): i for i in range(config.num_labels)}
    numbers |= {str(name): int(number) for name, number in (config.label2id or {}).items()}
    for _, label in rows:
        if str(label) not in numbers:
            raise UserError(f"--task {path}: label {label!r} is none of {', '.join(numbers)}")
    return [(text, numbers[str(label)]) for text, label in rows]


def _encoded(
    texts: Sequence[Text], tokenizer: Any, length: int | None, given: str
) -> list[list[int]]:
    try:
        return encoded(texts, tokenizer, length)
    except DataError as error:
        raise UserError(f"{given}: {error}") from error


def _drawn(found: Sequence[T], samples: int) -> list[T]:
    """Some, at random, since files may be sorted."""
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(SEED))
    return [found[at] for at in order[:samples].tolist()]


def _pieces(
    texts: Sequence[Text], tokenizer: Any, samples: int, length: int, given: str
) -> list[list[int]]:
    """Pieces of at least two tokens, at most `samples`, evenly from all texts."""
    begin = begin_of(tokenizer)
    found = [
        piece
        for ids in _encoded(texts, tokenizer, None, given)
        for piece in pieces_of(ids, begin, length)
        if len(piece) > 1
    ]
    if not found:
        raise UserError(f"{given}: the held-out half has no two tokens in a row")
    return _drawn(found, samples)
