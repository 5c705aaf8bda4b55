"""Judges: how well a model does on texts, and how much it has changed on others.

For a causal language model both are losses, in nats a token. For a classifier of sequences the
first is the loss, with the accuracy; the second is of how many texts the nearest neighbours are no
longer the base model's.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from spectral_ds.cli.errors import UserError
from spectral_ds.cli.merge.looking import SEED, Amount
from spectral_ds.cli.models import CAUSAL
from spectral_ds.coactivation import only_looking
from spectral_ds.text import DataError, read_labelled_texts, read_texts

CLASSIFIER = "ForSequenceClassification"
# Nearest neighbours of a text, by the cosine of mean hidden states.
NEIGHBOURS = 10
BATCH_TOKENS = 512
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
        rows, labels = _labelled(task, model)
        return (
            _Classifiers(
                [_cut(ids, length) for ids in _encoded(rows, tokenizer)][: amount.samples],
                labels[: amount.samples],
                [_cut(ids, length) for ids in _encoded(_texts(general, "--general"), tokenizer)][
                    : amount.samples
                ],
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
        general = _loss(model, self._general)
        if self._of_base is None:
            self._of_base = general
        return Judgement(_loss(model, self._task), None, general, general - self._of_base)


class _Classifiers:
    def __init__(
        self, task: list[list[int]], labels: list[int], general: list[list[int]], path: str
    ) -> None:
        if len(general) <= NEIGHBOURS:
            raise UserError(f"--general {path}: {len(general)} texts of the held-out half are few")
        self._task, self._labels, self._general = task, torch.tensor(labels), general
        self._of_base: torch.Tensor | None = None

    def __call__(self, model: nn.Module) -> Judgement:
        with only_looking(model):
            logits = torch.cat(
                [
                    model(input_ids=ids, attention_mask=mask).logits
                    for ids, mask in _batches(self._task)
                ]
            ).float()
        loss = float(functional.cross_entropy(logits, self._labels))
        accuracy = float((logits.argmax(1) == self._labels).double().mean())
        nearest = self._nearest(model)
        if self._of_base is None:
            self._of_base = nearest
        same = (nearest[:, :, None] == self._of_base[:, None, :]).any(2)
        kept = float(same.double().mean())
        return Judgement(loss, accuracy, kept, 1 - kept)

    def _nearest(self, model: nn.Module) -> torch.Tensor:
        """(texts, NEIGHBOURS): numbers of the texts nearest to each."""
        found = []
        with only_looking(model):
            for ids, mask in _batches(self._general):
                output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
                hidden = output.hidden_states[-1].double()
                weight = mask[:, :, None].double()
                found.append((hidden * weight).sum(1) / weight.sum(1))
        vectors = functional.normalize(torch.cat(found), dim=1)
        likeness = (vectors @ vectors.T).fill_diagonal_(-2)
        return likeness.topk(NEIGHBOURS, dim=1).indices


def _loss(model: nn.Module, pieces: list[list[int]]) -> float:
    """Nats a token, over all tokens but the first of each piece."""
    total, count = 0.0, 0
    with only_looking(model):
        for ids, mask in _batches(pieces):
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
            total += float(
                functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            )
            count += int(mask[:, 1:].sum())
    return total / count


def _batches(pieces: Sequence[list[int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and masks, in order, padded at their ends."""
    at_once = max(1, BATCH_TOKENS // max(map(len, pieces)))
    for first in range(0, len(pieces), at_once):
        held = pieces[first : first + at_once]
        ids = torch.zeros(len(held), max(map(len, held)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, piece in enumerate(held):
            ids[row, : len(piece)] = torch.tensor(piece)
            mask[row, : len(piece)] = 1
        yield ids, mask


def _texts(path: Path, option: str) -> list[str]:
    try:
        return read_texts(path)[HELD_OUT::2]
    except DataError as error:
        raise UserError(f"{option} {path}: {error}") from error


def _labelled(path: Path, model: nn.Module) -> tuple[list[str], list[int]]:
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
    return [text for text, _ in rows], [numbers[str(label)] for _, label in rows]


def _encoded(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    found: list[list[int]] = tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
    return found


def _cut(ids: list[int], length: int) -> list[int]:
    return ids[:length]


def _pieces(
    texts: Sequence[str], tokenizer: Any, samples: int, length: int, given: str
) -> list[list[int]]:
    """Pieces of at least two tokens, at most `samples`, evenly from all texts."""
    found = [
        piece
        for ids in _encoded(texts, tokenizer)
        for at in range(0, len(ids), length)
        if len(piece := ids[at : at + length]) > 1
    ]
    if not found:
        raise UserError(f"{given}: the held-out half has no two tokens in a row")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(SEED))
    return [found[at] for at in order[:samples].tolist()]
