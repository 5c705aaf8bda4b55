"""`spectral-ds add`: a DeepSpeed JSON with the section as its last key, and the rest untouched."""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hjson  # type: ignore[import-untyped]

from spectral_ds.cli.arguments import add_command
from spectral_ds.cli.errors import UserError
from spectral_ds.config import PRESETS, SECTION, load_config, read_json
from spectral_ds.files import write_whole

EXAMPLES = """examples:
  spectral-ds add ds_config.json --preset retain            prints the new file
  spectral-ds add ds_config.json --preset retain --write    writes it in place
"""
# DeepSpeed reads its JSON with comments.
TOKEN = re.compile(
    r"""(?P<space>(?:\s|\ufeff|//[^\n]*|\#[^\n]*|/\*.*?\*/)+)
      | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      | (?P<mark>[{}\[\],:])
      | (?P<word>(?:[^\s{}\[\],:"'\#/]|/(?![/*]))+)
      | (?P<other>.)""",
    re.DOTALL | re.VERBOSE,
)


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(
        commands,
        "add",
        run,
        summary="a DeepSpeed config with the section added",
        description='Prints a DeepSpeed config with the section "spectral_ds" as its last key.\n'
        "All the rest stays as it is, byte for byte, comments too.",
        examples=EXAMPLES,
    )
    parser.add_argument("config", type=Path, metavar="DS_CONFIG.json")
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="default: paper")
    parser.add_argument("--write", action="store_true", help="write the file in place")
    parser.add_argument("--force", action="store_true", help="replace a section that is there")


def run(arguments: argparse.Namespace) -> int:
    """Print or write the file."""
    path = arguments.config
    section = {"preset": arguments.preset}
    load_config({SECTION: section})
    content = read_json(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: does not hold a JSON object")
    if SECTION in content and not arguments.force:
        raise UserError(f'{path}: has the section "{SECTION}" already; --force replaces it')
    text = path.read_bytes().decode("utf-8")
    edited = with_section(text, section)
    if edited is None or not _is_as_wanted(edited, {**content, SECTION: section}):
        line = f'"{SECTION}": {json.dumps(section)}'
        raise UserError(f"{path}: is not plain JSON with comments; add by hand: {line}")
    if not arguments.write:
        sys.stdout.write(edited)
        return 0
    write_whole(path, lambda unfinished: unfinished.write_bytes(edited.encode("utf-8")))
    print(f'spectral-ds: {path}: now has "{SECTION}": {json.dumps(section)}', file=sys.stderr)
    return 0


def with_section(text: str, section: Mapping[str, Any]) -> str | None:
    """JSON with comments, with the section as the last key, or in the place of the one there.

    Returns:
        None if the text is not of that kind.
    """
    outline = _outline(text)
    if outline is None:
        return None
    value = json.dumps(section)
    if outline.section is not None:
        start, end = outline.section
        return text[:start] + value + text[end:]
    body, rest = text[: outline.last], text[outline.last : outline.close]
    comments = rest.rstrip()
    key = f'"{SECTION}": {value}'
    newline = "\r\n" if "\r\n" in text else "\n"
    comma = "," if outline.needs_comma else ""
    before, after = (" " if outline.last > outline.start else ""), rest[len(comments) :]
    if "\n" in text[outline.start : outline.close]:
        before = newline + outline.indent
        after = after if "\n" in after else newline
    return f"{body}{comma}{comments}{before}{key}{after}{text[outline.close :]}"


@dataclass
class _Outline:
    """Places in the text of an object.

    Attributes:
        start: after its first brace.
        close: before its last.
        last: after the last thing in it that is no comment.
        needs_comma: whether a comma must stand before another key.
        indent: of its first key.
        section: where the section's value stands.
    """

    start: int
    close: int
    last: int
    needs_comma: bool
    indent: str
    section: tuple[int, int] | None


def _outline(text: str) -> _Outline | None:
    tokens = [match for match in TOKEN.finditer(text) if match.lastgroup != "space"]
    if not tokens or tokens[0].group() != "{" or tokens[-1].group() != "}":
        return None
    depth, key, state, begin = 0, "", "key", 0
    section = None
    for token in tokens[1:-1]:
        word, is_mark = token.group(), token.lastgroup == "mark"
        depth -= is_mark and word in "]}"
        if depth == 0:
            if state == "key":
                key, state = word.strip("\"'"), "colon"
            elif state == "colon":
                state = "begin"
            elif is_mark and word == ",":
                state = "key"
            else:
                begin = token.start() if state == "begin" else begin
                state = "value"
                if key == SECTION:
                    section = begin, token.end()
        depth += is_mark and word in "[{"
    first, last = tokens[1], tokens[-2]
    line = text[: first.start()].rpartition("\n")[2]
    return _Outline(
        start=tokens[0].end(),
        close=tokens[-1].start(),
        last=last.end(),
        needs_comma=last.group() not in ("{", ","),
        indent=line if first is not tokens[-1] and not line.strip() else "  ",
        section=section,
    )


def _is_as_wanted(text: str, wanted: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed reads this from it, keys in this order."""
    try:
        return list(hjson.loads(text).items()) == list(wanted.items())
    except ValueError:
        return False
