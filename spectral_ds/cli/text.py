"""Local text as batches of tokens for a causal or a masked language model.

In:  a TSV, JSONL or plain text file, or a folder written by `datasets.save_to_disk`.
       TSV         with a header: the text column; without one: the last column
       JSONL       one object a line, the text column is a key
       plain text  passages separated by blank lines, or one a line if there are none
       datasets    the text column; of several splits, `train`
Out: batches of sequences of equal length; no two hold the same text.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from spectral_ds.cli.errors import UserError

# Keyword arguments of a model, each (batch size, sequence length), int64.
Batch = Mapping[str, torch.Tensor]

# Share of the tokens that a masked language model is to guess (Devlin et al., arXiv 1810.04805).
MASKED_SHARE = 0.15
NOT_GUESSED = -100  # by the convention of torch's cross-entropy

# Texts are encoded so many at a time, until there are tokens enough.
TEXTS_AT_ONCE = 256
TEXT_COLUMN = "text"


def read_texts(path: Path, column: str | None) -> list[str]:
    """All texts with a letter or digit.

    Args:
        column: name of the text column or key; None: `text`, if there is a choice.

    Raises:
        UserError: the path does not exist, cannot be read as its kind, or holds no text.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    try:
        if path.is_dir():
            texts = _of_dataset(path, column or TEXT_COLUMN)
        elif path.suffix == ".tsv":
            texts = _of_tsv(path, column)
        elif path.suffix in {".jsonl", ".json"}:
            texts = _of_jsonl(path, column or TEXT_COLUMN)
        else:
            texts = _of_plain_text(path)
        found = [text for text in texts if any(character.isalnum() for character in text)]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not found:
        raise UserError(f"{path}: holds no text")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Not splitlines(): a text may hold other characters that count as line ends there.
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def _of_tsv(path: Path, column: str | None) -> Iterator[str]:
    position = -1
    for number, line in _lines(path):
        cells = line.split("\t")
        if number == 1 and (column or TEXT_COLUMN) in cells:
            position = cells.index(column or TEXT_COLUMN)
        elif number == 1 and column is not None:
            raise UserError(f"{path}: has no column {column!r}, only {', '.join(cells)}")
        elif position < len(cells):
            yield cells[position]
        else:
            raise UserError(f"{path}: line {number} has only {len(cells)} column(s)")


def _of_jsonl(path: Path, column: str) -> Iterator[str]:
    for number, line in _lines(path):
        try:
            yield str(json.loads(line)[column])
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error})") from error
        except (KeyError, TypeError, IndexError):
            raise UserError(f"{path}: line {number} is not an object with {column!r}") from None


def _of_plain_text(path: Path) -> Iterator[str]:
    content = path.read_text(encoding="utf-8-sig")
    passages = content.split("\n\n")
    for passage in passages if len(passages) > 1 else content.split("\n"):
        yield passage.strip()


def _of_dataset(path: Path, column: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path}: a datasets folder needs: pip install datasets") from None
    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: is not a folder that datasets.save_to_disk wrote") from None
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise UserError(f"{path}: has no split 'train', only {', '.join(loaded)}")
        loaded = loaded["train"]
    if column not in loaded.column_names:
        raise UserError(f"{path}: has no column {column!r}, only {', '.join(loaded.column_names)}")
    for row in loaded:
        yield str(row[column])


def token_batches(
    path: Path,
    column: str | None,
    tokenizer: Any,
    *,
    batches: int,
    batch_size: int,
    sequence_length: int,
    seed: int,
) -> torch.Tensor:
    """Texts in random order, joined by the end token and cut into sequences of equal length.

    Returns:
        (batches, batch_size, sequence_length), int64.

    Raises:
        UserError: the text cannot be read, or is too short for so many different batches.
    """
    texts = read_texts(path, column)
    end = tokenizer.eos_token_id
    if end is None:
        end = tokenizer.sep_token_id
    if end is None:
        raise UserError(
            f"{path}: the model's tokenizer has no end-of-text or separator token to join texts by"
        )
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    needed = batches * batch_size * sequence_length
    stream: list[int] = []
    for first in range(0, len(order), TEXTS_AT_ONCE):
        chosen = [texts[i] for i in order[first : first + TEXTS_AT_ONCE]]
        for ids in tokenizer(chosen, add_special_tokens=False, verbose=False)["input_ids"]:
            stream += [*ids, end]
        if len(stream) >= needed:
            return torch.tensor(stream[:needed]).view(batches, batch_size, sequence_length)
    raise UserError(
        f"{path}: has {len(stream):,} tokens, and {batches} batches of {batch_size} x "
        f"{sequence_length} need {needed:,}; lower --steps, --batch-size or --sequence-length"
    )


def causal(tokens: torch.Tensor) -> list[Batch]:
    """Batches on which a model guesses each next token.

    Args:
        tokens: (batches, batch size, sequence length), int64.
    """
    return [{"input_ids": batch, "labels": batch} for batch in tokens]


def masked(tokens: torch.Tensor, tokenizer: Any, seed: int) -> list[Batch]:
    """Batches on which a model guesses tokens that are masked at random.

    Args:
        tokens: (batches, batch size, sequence length), int64.

    Raises:
        UserError: the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise UserError(
            "--data needs a causal or a masked language model; this one's tokenizer has no mask"
        )
    generator = torch.Generator().manual_seed(seed)
    is_masked = torch.rand(tokens.shape, generator=generator) < MASKED_SHARE
    is_masked[:, 0, 0] = True  # a loss needs something to guess
    inputs = tokens.masked_fill(is_masked, tokenizer.mask_token_id)
    labels = tokens.masked_fill(~is_masked, NOT_GUESSED)
    pairs = zip(inputs, labels, strict=True)
    return [{"input_ids": batch, "labels": wanted} for batch, wanted in pairs]
