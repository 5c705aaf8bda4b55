"""Turns local text into tensors for fine-tuning.

In:  a TSV, JSONL or plain text file, or a folder written by ``datasets.save_to_disk``.
       TSV         with a header: columns ``text`` and, to classify, ``label``;
                   without one: the last column is the text, the one before it the label
       JSONL       one object a line, keys ``text`` and, to classify, ``label``
       plain text  passages separated by blank lines, or one a line if there are none
       datasets    columns ``text`` and ``label``; of several splits, ``train``
Out: training and held-out examples, and batches of them in an order that depends on the seed and
     the step only: every rank finds its part of any step without having read the ones before.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
Collate = Callable[[Sequence[Any]], Batch]


class DataError(Exception):
    """The data cannot be used; the message says why."""


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
    """Reads texts, and labels if ``labelled``; texts without a letter or digit are left out.

    Raises:
        DataError: the path does not exist, cannot be read as its kind, or holds no text.
    """
    if not path.exists():
        raise DataError("no such file or folder")
    try:
        if path.is_dir():
            rows = list(_rows_of_dataset(path, labelled))
        elif path.suffix == ".tsv":
            rows = list(_rows_of_tsv(path, labelled))
        elif path.suffix in {".jsonl", ".json"}:
            rows = list(_rows_of_jsonl(path, labelled))
        else:
            rows = list(_rows_of_plain_text(path, labelled))
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text ({error})") from error
    rows = [row for row in rows if any(character.isalnum() for character in row[0])]
    if not rows:
        raise DataError("holds no text")
    texts = [text for text, _ in rows]
    if not labelled:
        return Corpus(texts, None, 0)
    labels = _classes([label for _, label in rows])
    num_classes = max(labels) + 1
    if num_classes < 2:
        raise DataError("has only one class")
    return Corpus(texts, labels, num_classes)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Not splitlines(): a text may hold other characters that count as line ends there.
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def _rows_of_tsv(path: Path, labelled: bool) -> Iterator[tuple[str, Any]]:
    text_column, label_column = -1, -2
    for number, line in _lines(path):
        cells = line.split("\t")
        if number == 1 and "text" in cells:
            text_column = cells.index("text")
            if labelled and "label" not in cells:
                raise DataError("has no column 'label'")
            label_column = cells.index("label") if "label" in cells else text_column
            continue
        try:
            yield cells[text_column], cells[label_column] if labelled else None
        except IndexError:
            raise DataError(f"line {number} has only {len(cells)} column(s)") from None


def _rows_of_jsonl(path: Path, labelled: bool) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
            yield row["text"], row["label"] if labelled else None
        except json.JSONDecodeError as error:
            raise DataError(f"line {number} is not JSON ({error})") from error
        except (KeyError, TypeError):
            keys = "'text' and 'label'" if labelled else "'text'"
            raise DataError(f"line {number} is not an object with {keys}") from None


def _rows_of_plain_text(path: Path, labelled: bool) -> Iterator[tuple[str, Any]]:
    if labelled:
        raise DataError("plain text has no labels: use a TSV, JSONL or datasets folder")
    content = path.read_text(encoding="utf-8-sig")
    passages = content.split("\n\n")
    if len(passages) == 1:
        passages = content.split("\n")
    for passage in passages:
        yield passage.strip(), None


def _rows_of_dataset(path: Path, labelled: bool) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise DataError("reading a datasets folder needs: pip install datasets") from None
    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise DataError("is a folder that datasets.save_to_disk did not write") from None
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise DataError(f"has no split 'train', only {', '.join(loaded)}")
        loaded = loaded["train"]
    for column in ["text", "label"] if labelled else ["text"]:
        if column not in loaded.column_names:
            raise DataError(f"has no column {column!r}, only {', '.join(loaded.column_names)}")
    for row in loaded:
        yield row["text"], row["label"] if labelled else None


def _classes(labels: list[Any]) -> list[int]:
    """Classes of labels: whole numbers from 0 as they are, ratings by sign, names by order."""
    try:
        numbers = [float(label) for label in labels]
    except (TypeError, ValueError):
        names = sorted({str(label) for label in labels})
        return [names.index(str(label)) for label in labels]
    if all(number.is_integer() and number >= 0 for number in numbers):
        return [int(number) for number in numbers]
    return [int(number > 0) for number in numbers]


def language_modelling_examples(
    corpus: Corpus, tokenizer: Any, sequence_length: int, *, num_held_out: int, seed: int
) -> Examples:
    """Texts in random order, joined by the end token and cut into sequences of equal length."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no end-of-text token")
    order = torch.randperm(len(corpus.texts), generator=torch.Generator().manual_seed(seed))
    encoded = tokenizer([corpus.texts[i] for i in order], add_special_tokens=False, verbose=False)
    stream = [token for text in encoded["input_ids"] for token in (*text, end)]
    sequences = torch.tensor(stream[: len(stream) // sequence_length * sequence_length])
    sequences = sequences.view(-1, sequence_length)

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
