"""Local text in one of four formats, with labels if they are wanted, or with conversations.

In:  a TSV, JSONL or plain text file, or a folder written by `datasets.save_to_disk`.
       TSV         with a header: the columns of the text and the label;
                   without one: the last column is the text, the one before it the label
       JSONL       one object a line, text and label are keys
       plain text  passages separated by blank lines, or one a line if there are none; no labels
       datasets    the columns of the text and the label; of several splits, `train`
Out: the texts that have a letter or digit, each with its label as it was written.

What a language model is trained on may also be, in JSONL and in datasets, where there is no text:
       messages              a conversation, by the chat template; with its `tools` if it has any
       prompt, completion    the second behind the first: two texts, or messages each
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT_COLUMN, LABEL_COLUMN = "text", "label"
MESSAGES, TOOLS, PROMPT, COMPLETION = "messages", "tools", "prompt", "completion"
# Where they stand in a TSV without a header.
TEXT_POSITION, LABEL_POSITION = -1, -2


class DataError(Exception):
    """Text that cannot be used; the message says why, and who gave its path says which."""


@dataclass(frozen=True)
class Chat:
    """A conversation, as a chat template takes it.

    Attributes:
        messages: each with its role, and mostly with content.
        tools: that are offered in it; None: none.
        where: it stands in its file.
    """

    messages: list[dict[str, Any]]
    tools: Any
    where: str


# What a language model is trained on.
Text = str | Chat
# A text and its label.
Row = tuple[str, Any]
# Likewise, None where labels are not wanted, and where it stands.
_Placed = tuple[Text, Any, str]


def read_texts(path: Path, column: str | None = None) -> list[str]:
    """All texts.

    Args:
        column: name of the text's column or key; None: `text`, if there is a choice.

    Raises:
        DataError: the path does not exist, cannot be read as its kind, or holds no text.
    """
    return [str(text) for text, _, _ in _rows(path, column, labelled=False)]


def read_learnable(path: Path) -> list[Text]:
    """All texts and conversations.

    Raises:
        DataError: as by `read_texts`.
    """
    return [text for text, _, _ in _rows(path, None, labelled=False, chats=True)]


def encoded(texts: Sequence[Text], tokenizer: Any, length: int | None = None) -> list[list[int]]:
    """Token ids of each text, with special tokens; of each conversation, by the chat template.

    Args:
        tokenizer: a Hugging Face tokenizer.
        length: tokens to cut each at, as in training: what ends a text stays.

    Raises:
        DataError: there is no chat template, or it does not take a conversation.
    """
    plain = [text for text in texts if isinstance(text, str)]
    options = {"truncation": length is not None, "max_length": length, "verbose": False}
    found = iter(tokenizer(plain, **options)["input_ids"] if plain else ())
    return [
        next(found) if isinstance(text, str) else _of_chat(text, tokenizer)[:length]
        for text in texts
    ]


def begin_of(tokenizer: Any) -> list[int]:
    """The begin token, where a tokenizer puts it before every text: many models are lost without.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("")["input_ids"][:1] == [begin] else []


def pieces_of(ids: Sequence[int], begin: Sequence[int], length: int) -> list[list[int]]:
    """Token ids in pieces of at most a length; each begins as all do, if the first does.

    Args:
        begin: from `begin_of`.
    """
    own = [*begin] if length > len(begin) and [*ids[: len(begin)]] == [*begin] else []
    room = length - len(own)
    return [[*own, *ids[at : at + room]] for at in range(len(own), len(ids), room)]


def _of_chat(chat: Chat, tokenizer: Any) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{chat.where} is a conversation, and the tokenizer of {tokenizer.name_or_path} has no "
            "chat template: save the one of the training with it, or give texts"
        )
    try:
        ids = tokenizer.apply_chat_template(chat.messages, tools=chat.tools, return_dict=True)
    except Exception as error:  # templates are programs
        raise DataError(
            f"{chat.where}: the chat template of {tokenizer.name_or_path} does not take it: "
            f"{' '.join(str(error).split())}"
        ) from error
    found: list[int] = ids["input_ids"]
    return found


def read_labelled_texts(path: Path) -> list[Row]:
    """All texts of the column `text` with their labels of the column `label`.

    Raises:
        DataError: as by `read_texts`; or a text has no label, or a single one has no number.
    """
    rows = _rows(path, None, labelled=True)
    for _, label, where in rows:
        if label is None or label != label or (isinstance(label, str) and not label.strip()):
            raise DataError(f"{where} has the label {label!r}: leave out texts without one")
    names = [(label, where) for _, label, where in rows if not _is_number(label)]
    if len(names) == 1 and len(rows) > 2:
        [(label, where)] = names
        raise DataError(
            f"{where} has the label {label!r}, and all others have numbers: labels are all numbers "
            f"or all names, and a header names the columns {TEXT_COLUMN!r} and {LABEL_COLUMN!r}"
        )
    return [(str(text), label) for text, label, _ in rows]


def _is_number(label: Any) -> bool:
    try:
        float(label)
    except (TypeError, ValueError):
        return False
    return True


def _rows(path: Path, column: str | None, labelled: bool, chats: bool = False) -> list[_Placed]:
    if not path.exists():
        raise DataError("no such file or folder")
    try:
        if path.is_dir():
            rows = _of_dataset(path, column or TEXT_COLUMN, labelled, chats)
        elif path.suffix == ".tsv":
            rows = _of_tsv(path, column, labelled)
        elif path.suffix in {".jsonl", ".json"}:
            rows = _of_jsonl(path, column or TEXT_COLUMN, labelled, chats)
        elif path.suffix == ".csv":
            raise DataError("CSV is not read: save it as TSV or JSONL")
        elif column is not None:
            raise DataError(f"is plain text, which has no column {column!r}")
        else:
            rows = _of_plain_text(path, labelled)
        found = [row for row in rows if any(map(str.isalnum, _words(row[0])))]
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text ({error})") from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}") from error
    if not found:
        raise DataError("holds no text")
    return found


def _words(text: Text) -> str:
    """What is said in it."""
    if isinstance(text, str):
        return text
    return " ".join(str(message.get("content", "")) for message in text.messages)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # Not splitlines(): a text may hold other characters that count as line ends there.
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def _of_tsv(path: Path, column: str | None, labelled: bool) -> Iterator[_Placed]:
    text, label = TEXT_POSITION, LABEL_POSITION if labelled else TEXT_POSITION
    most: tuple[int, str] | None = None  # columns that a line may have, as which one has them
    for number, line in _lines(path):
        cells = line.split("\t")
        has_header = {column or TEXT_COLUMN, LABEL_COLUMN}.intersection(cells)
        if number == 1 and (has_header or column is not None):
            _require(cells, column or TEXT_COLUMN, labelled)
            text = cells.index(column or TEXT_COLUMN)
            label = cells.index(LABEL_COLUMN) if labelled else text
            most = len(cells), "the header"
            continue
        if most is None and labelled:  # without labels, the text is last whatever comes before
            most = len(cells), f"line {number}"
        if most is not None and len(cells) > most[0]:
            raise DataError(
                f"line {number} has {len(cells)} columns, and {most[1]} {most[0]}: a text may hold "
                "no tab"
            )
        try:
            yield cells[text], cells[label] if labelled else None, f"line {number}"
        except IndexError:
            raise DataError(f"line {number} has only {len(cells)} column(s)") from None


def _of_jsonl(path: Path, column: str, labelled: bool, chats: bool) -> Iterator[_Placed]:
    for number, line in _lines(path):
        where = f"line {number}"
        try:
            row = json.loads(line)
            if chats and (learnable := _learnable(row, where)) is not None:
                yield learnable, None, where
                continue
            if (text := row[column]) is None:
                raise DataError(f"{where} has no {column!r}: null")
            yield str(text), row[LABEL_COLUMN] if labelled else None, where
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is not JSON ({error})") from error
        except (KeyError, TypeError, IndexError):
            keys = f"{column!r} and {LABEL_COLUMN!r}" if labelled else f"{column!r}"
            keys += f", {MESSAGES!r}, or {PROMPT!r} and {COMPLETION!r}" if chats else ""
            raise DataError(f"{where} is not an object with {keys}") from None


def _learnable(row: Any, where: str) -> Text | None:
    """What a row without a text has in its place; None: nothing.

    Raises:
        DataError: it cannot be used.
    """
    if not isinstance(row, Mapping) or TEXT_COLUMN in row:
        return None
    if MESSAGES in row:
        return _chat(row[MESSAGES], row, MESSAGES, where)
    if PROMPT not in row or COMPLETION not in row:
        return None
    prompt, completion = row[PROMPT], row[COMPLETION]
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat(prompt + completion, row, f"{PROMPT} + {COMPLETION}", where)
    raise DataError(
        f"{where}: {PROMPT!r} and {COMPLETION!r} must be two texts, or two lists of messages"
    )


def _chat(messages: Any, row: Mapping[str, Any], key: str, where: str) -> Chat:
    is_list = isinstance(messages, list) and all(
        isinstance(each, Mapping) and isinstance(each.get("role"), str) for each in messages
    )
    if not is_list or not messages:
        raise DataError(f"{where}: {key!r} must be a list of messages, each with its role")
    # Datasets give every message all keys that one has.
    own = [{k: v for k, v in m.items() if v is not None or k == "content"} for m in messages]
    tools = row.get(TOOLS) or None
    try:
        return Chat(own, json.loads(tools) if isinstance(tools, str) else tools, where)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: {TOOLS!r} is not JSON ({error})") from error


def _of_plain_text(path: Path, labelled: bool) -> Iterator[_Placed]:
    if labelled:
        raise DataError("plain text has no labels: use a TSV, JSONL or datasets folder")
    content = path.read_text(encoding="utf-8-sig")
    passages = content.split("\n\n")
    for passage in passages if len(passages) > 1 else content.split("\n"):
        yield passage.strip(), None, ""


def _of_dataset(path: Path, column: str, labelled: bool, chats: bool) -> Iterator[_Placed]:
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
    keys = {*loaded.column_names}
    has_chats = TEXT_COLUMN not in keys and (MESSAGES in keys or {PROMPT, COMPLETION} <= keys)
    if not (chats and has_chats):
        _require(loaded.column_names, column, labelled)
    for number, row in enumerate(loaded):
        if chats and (learnable := _learnable(row, f"row {number}")) is not None:
            yield learnable, None, f"row {number}"
            continue
        yield str(row[column]), row[LABEL_COLUMN] if labelled else None, f"row {number}"


def _require(columns: list[str], text: str, labelled: bool) -> None:
    """Refuse data that lacks a column."""
    for column in [text, LABEL_COLUMN] if labelled else [text]:
        if column not in columns:
            raise DataError(f"has no column {column!r}, only {', '.join(columns)}")
