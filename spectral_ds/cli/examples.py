"""Local text as training and held-out examples, and batches of them for each rank.

In:  text in one of the formats of `spectral_ds.text`; to classify, with labels.
Out: examples, and batches of them in an order that depends on the seed and the step only: every
     rank finds its part of any step without having read the ones before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_ds.text import DataError, begin_of, read_labelled_texts, read_texts

Batch = dict[str, Tensor]
Collate = Callable[[Sequence[Any]], Batch]


@dataclass(frozen=True)
class Corpus:
    """Texts and, to classify, their classes 0 .. num_classes - 1."""

    texts: list[str]
    labels: list[int] | None
    num_classes: int


@dataclass(frozen=True)
class Examples:
    """Training and held-out examples with the function that makes a batch of some of them."""

    training: Sequence[Any]
    held_out: Sequence[Any]
    collate: Collate


def load_corpus(path: Path, *, labelled: bool) -> Corpus:
    """Reads texts, and labels if ``labelled``.

    Raises:
        DataError: the path does not exist, cannot be read as its kind, or holds no text; or labels
            are wanted, and there are none, of one class only, or of fewer than half of the classes
            that they number.
    """
    if not labelled:
        return Corpus(read_texts(path), None, 0)
    texts, labels = zip(*read_labelled_texts(path), strict=True)
    classes = _classes(labels)
    found, num_classes = len(set(classes)), max(classes) + 1
    if found < 2:
        raise DataError("has only one class")
    if 2 * found < num_classes:
        raise DataError(
            f"has {found} classes, with numbers up to {num_classes - 1}: number classes from 0 "
            "without gaps, or name them"
        )
    return Corpus(list(texts), classes, num_classes)


def _classes(labels: Sequence[Any]) -> list[int]:
    """Classes of labels: whole numbers from 0 as they are, ratings by sign, names by order.

    Raises:
        DataError: numbers are neither.
    """
    try:
        numbers = [float(label) for label in labels]
    except (TypeError, ValueError):
        names = sorted({str(label) for label in labels})
        return [names.index(str(label)) for label in labels]
    if any(map(math.isnan, numbers)):
        raise DataError("has the label nan: leave out texts without a label")
    if all(number.is_integer() and number >= 0 for number in numbers):
        return [int(number) for number in numbers]
    whole = {int(number) for number in numbers if number.is_integer()}
    if len(whole) == len(set(numbers)) and min(whole) == -1 and max(whole) > 1:
        raise DataError(
            f"has labels -1 to {max(whole)}: number classes from 0, and leave out texts without one"
        )
    if not min(numbers) < 0 < max(numbers):
        raise DataError(
            f"has labels {min(numbers):g} to {max(numbers):g}: ratings are below 0 and above it, "
            "classes are whole numbers from 0"
        )
    return [int(number > 0) for number in numbers]


def language_modelling_examples(
    corpus: Corpus, tokenizer: Any, sequence_length: int, *, num_held_out: int, seed: int
) -> Examples:
    """Texts in random order, joined by the end token and cut into sequences of equal length.

    Every sequence has the begin token first, where the tokenizer puts it before a text.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no end-of-text token")
    order = torch.randperm(len(corpus.texts), generator=torch.Generator().manual_seed(seed))
    encoded = tokenizer([corpus.texts[i] for i in order], add_special_tokens=False, verbose=False)
    stream = [token for text in encoded["input_ids"] for token in (*text, end)]
    begin = torch.tensor(begin_of(tokenizer), dtype=torch.long)
    room = sequence_length - len(begin)
    cut = torch.tensor(stream[: len(stream) // room * room]).view(-1, room)
    sequences = torch.cat((begin.expand(len(cut), -1), cut), dim=1)

    def collate(chosen: Sequence[Tensor]) -> Batch:
        input_ids = torch.stack(list(chosen))
        return {"input_ids": input_ids, "labels": input_ids.clone()}

    return _split(list(sequences), num_held_out, collate)


def classification_examples(
    corpus: Corpus, tokenizer: Any, sequence_length: int, *, num_held_out: int, seed: int
) -> Examples:
    """Texts cut at the sequence length, padded to the longest of their batch, with their class."""
    assert corpus.labels is not None
    encoded = tokenizer(corpus.texts, truncation=True, max_length=sequence_length)["input_ids"]
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(seed)).tolist()
    pairs = [(encoded[i], corpus.labels[i]) for i in order]

    def collate(chosen: Sequence[tuple[list[int], int]]) -> Batch:
        batch = tokenizer.pad({"input_ids": [ids for ids, _ in chosen]}, return_tensors="pt")
        return {**batch, "labels": torch.tensor([label for _, label in chosen])}

    return _split(pairs, num_held_out, collate)


def _split(examples: Sequence[Any], num_held_out: int, collate: Collate) -> Examples:
    if len(examples) <= num_held_out:
        raise DataError(
            f"is too short: {len(examples)} example(s), of which {num_held_out} are held out"
        )
    return Examples(examples[num_held_out:], examples[:num_held_out], collate)


def batches(
    examples: Sequence[Any],
    collate: Collate,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    first: int = 0,
) -> Iterator[Batch]:
    """Yields this rank's batches for ever, a new random order each epoch.

    Batch ``first`` comes first, so a resumed run goes on where the data stopped. The examples that
    all ranks see together depend on ``batch_size * world_size`` only.

    Raises:
        DataError: there are not enough examples for one batch on every rank.
    """
    together = batch_size * world_size
    per_epoch = len(examples) // together
    if per_epoch == 0:
        raise DataError(f"is too short: {len(examples)} example(s), {together} needed for a batch")

    def generate() -> Iterator[Batch]:
        order: list[int] = []
        for index in itertools.count(first):
            epoch, position = divmod(index, per_epoch)
            if not order or position == 0:
                generator = torch.Generator().manual_seed(seed + epoch)
                order = torch.randperm(len(examples), generator=generator).tolist()
            start = position * together + rank * batch_size
            yield collate([examples[i] for i in order[start : start + batch_size]])

    return generate()
