"""Makes text of other kinds out of Python itself: code of its library, prose of its reference.

In:  the kind and which half: of files or of topics in alphabetical order, every second one, so
     that what is to be kept and what shows whether it was kept are not the same text.
Out: a JSONL in the cache folder, one text a line. Its path is printed.

    python launch/texts.py --kind code|prose --half 0|1 [--cache DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from reviews import default_cache

# Parts of the library that are for people to read: no tests, no tables.
LEAST, MOST = 4_000, 60_000  # bytes of a file


def code() -> Iterator[str]:
    """Modules of the standard library, in order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.glob("*.py")):
        if LEAST <= path.stat().st_size <= MOST:
            yield path.read_text("utf-8", errors="replace")


def prose() -> Iterator[str]:
    """Topics of the language reference, in order of their names."""
    for name in sorted(pydoc_data.topics.topics):
        yield pydoc_data.topics.topics[name]


def write(kind: str, half: int, cache: Path) -> Path:
    """Write every second text, if that is not done; the path."""
    texts = list({"code": code, "prose": prose}[kind]())[half::2]
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    content, target = "".join(lines).encode("utf-8"), cache / f"{kind}-{half}.jsonl"
    if target.is_file() and target.read_bytes() == content:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    # Complete or not there at all, whatever happens meanwhile.
    unfinished = target.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(target)
    return target


def main() -> None:
    """Writes texts and prints their path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=("code", "prose"), required=True)
    parser.add_argument("--half", type=int, choices=(0, 1), default=0)
    parser.add_argument("--cache", type=Path, default=default_cache())
    arguments = parser.parse_args()
    print(write(arguments.kind, arguments.half, arguments.cache))


if __name__ == "__main__":
    main()
