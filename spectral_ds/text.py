"""Local text in one of four formats, with labels if they are wanted.

In:  a TSV, JSONL or plain text file, or a folder written by `datasets.save_to_disk`.
       TSV         with a header: the columns of the text and the label;
                   without one: the last column is the text, the one before it the label
       JSONL       one object a line, text and label are keys
       plain text  passages separated by blank lines, or one a line if there are none; no labels
       datasets    the columns of the text and the label; of several splits, `train`
Out: the texts that have a letter or digit, each with its label as it was written.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEXT_COLUMN, LABEL_COLUMN = "text", "label"
# Where they stand in a TSV without a header.
TEXT_POSITION, LABEL_POSITION = -1, -2


class DataError(Exception):
    """Text that cannot be used; the message says why, and who gave its path says which."""


# A text and its label; None where labels are not wanted.
Row = tuple[str, Any]


def read_texts(path: Path, column: str | None = None) -> list[str]:
    """All texts.

    Args:
        column: name of the text's column or key; None: `text`, if there is a choice.

    Raises:
        DataError: the path does not exist, cannot be read as its kind, or holds no text.
    """
    return [text for text, _ in _rows(path, column, labelled=False)]


def read_labelled_texts(path: Path) -> list[Row]:
    """All texts of the column `text` with their labels of the column `label`.

    Raises:
        DataError: as by `read_texts`; or there are no labels.
    """
    return _rows(path, None, labelled=True)


def _rows(path: Path, column: str | None, labelled: bool) -> list[Row]:
    if not path.exists():
        raise DataError("no such file or folder")
    try:
        if path.is_dir():
            rows = _of_dataset(path, column or TEXT_COLUMN, labelled)
        elif path.suffix == ".tsv":
            rows = _of_tsv(path, column, labelled)
        elif path.suffix in {".jsonl", ".json"}:
            rows = _of_jsonl(path, column or TEXT_COLUMN, labelled)
        elif path.suffix == ".csv":
            raise DataError("CSV is not read: save it as TSV or JSONL")
        elif column is not None:
            raise DataError(f"is plain text, which has no column {column!r}")
        else:
            rows = _of_plain_text(path, labelled)
        found = [row for row in rows if any(character.isalnum() for character in row[0])]
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text ({error})") from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error
    if not found:
        raise DataError("holds no text")
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Not splitlines(): a text may hold other characters that count as line ends there.
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def _of_tsv(path: Path, column: str | None, labelled: bool) -> Iterator[Row]:
    text, label = TEXT_POSITION, LABEL_POSITION if labelled else TEXT_POSITION
    for number, line in _lines(path):
        cells = line.split("\t")
        has_header = {column or TEXT_COLUMN, LABEL_COLUMN}.intersection(cells)
        if number == 1 and (has_header or column is not None):
            _require(cells, column or TEXT_COLUMN, labelled)
            text = cells.index(column or TEXT_COLUMN)
            label = cells.index(LABEL_COLUMN) if labelled else text
            continue
        try:
            yield cells[text], cells[label] if labelled else None
        except IndexError:
            raise DataError(f"line {number} has only {len(cells)} column(s)") from None


def _of_jsonl(path: Path, column: str, labelled: bool) -> Iterator[Row]:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
            if (text := row[column]) is None:
                raise DataError(f"line {number} has no {column!r}: null")
            yield str(text), row[LABEL_COLUMN] if labelled else None
        except json.JSONDecodeError as error:
            raise DataError(f"line {number} is not JSON ({error})") from error
        except (KeyError, TypeError, IndexError):
            keys = f"{column!r} and {LABEL_COLUMN!r}" if labelled else f"{column!r}"
            raise DataError(f"line {number} is not an object with {keys}") from None


def _of_plain_text(path: Path, labelled: bool) -> Iterator[Row]:
    if labelled:
        raise DataError("plain text has no labels: use a TSV, JSONL or datasets folder")
    content = path.read_text(encoding="utf-8-sig")
    passages = content.split("\n\n")
    for passage in passages if len(passages) > 1 else content.split("\n"):
        yield passage.strip(), None


def _of_dataset(path: Path, column: str, labelled: bool) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise DataError("a datasets folder needs: pip install datasets") from None
    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise DataError("is not a folder that datasets.save_to_disk wrote") from None
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise DataError(f"has no split 'train', only {', '.join(loaded)}")
        loaded = loaded["train"]
    _require(loaded.column_names, column, labelled)
    for row in loaded:
        yield str(row[column]), row[LABEL_COLUMN] if labelled else None


def _require(columns: list[str], text: str, labelled: bool) -> None:
    """Refuse data that lacks a column."""
    for column in [text, LABEL_COLUMN] if labelled else [text]:
        if column not in columns:
            raise DataError(f"has no column {column!r}, only {', '.join(columns)}")
