"""State: what the results in a folder are of, so that none of something else join them."""

import fcntl
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spectral_ds.cli.compare.settings import NO_FILES, TOKENIZER, Comparison, chosen, inputs_of
from spectral_ds.cli.errors import UserError
from spectral_ds.coactivation import content_of, content_of_tokenizer
from spectral_ds.files import write_whole

FILE, LOCK = "comparison.json", "comparison.lock"
# Keys that may change when a comparison is gone on with; others belong to every row.
GROWING = ("seeds", "learning_rates", "tasks", "statistics", "methods", "only", "interpolated",
           "baseline", "drawn")  # fmt: skip
NAMED = ("tasks", "statistics", "methods")
# Of a method: what may grow. Of a dial its values may, but not its paths: rows name the last key
# of each alone.
DIAL, INTERPOLATED = "dial", "interpolated"


def contents_of(comparison: Comparison) -> dict[str, str]:
    """SHA-256 of each file or folder that a comparison reads, by the key that names it.

    Raises:
        UserError: one cannot be read.
    """
    named = {"model": comparison.model}
    named |= {f"tasks.{name}.data": each.data for name, each in comparison.tasks.items()}
    named |= {f"general.{name}.data": each.data for name, each in comparison.general.items()}
    named |= {
        f"statistics.{name}.keep": each.keep
        for name, each in comparison.statistics.items()
        if each.keep not in NO_FILES
    }
    for name, method in chosen(comparison).items():
        named |= {f"methods.{name}.{key}": word for key, word in inputs_of(method)}
    found = {}
    for key, path in named.items():
        read = content_of_tokenizer if key.endswith(f".{TOKENIZER}") else content_of
        try:
            if Path(path).exists():
                found[key] = read(Path(path))
        except OSError as error:
            raise UserError(f"{key} = {path}: {error.strerror or error}") from error
    return found


class State:
    """What a folder of results is of.

    Args:
        out: the folder.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._path = out, out / FILE

    @contextmanager
    def begun(
        self, written: Mapping[str, Any], contents: Mapping[str, str], goes_on: bool, writes: bool
    ) -> Iterator[None]:
        """Make the folder, or go on with it; inside, no other process writes to it.

        Args:
            written: the comparison as the user wrote it.
            contents: of the files that it reads.
            goes_on: whether the folder must be there.
            writes: whether something may be added.

        Raises:
            UserError: it holds something else, or results of other settings or files, or another
                process writes to it.
        """
        out = self._out
        if goes_on and not self._path.exists():
            raise UserError(f"--out {out}: holds no comparison to go on with")
        if not goes_on and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out}: is not empty; --resume goes on with a comparison there")
        if not writes:
            self._merged(written, contents, goes_on)
            yield
            return
        out.mkdir(parents=True, exist_ok=True)
        with _only_writer(out):
            text = json.dumps(
                self._merged(written, contents, goes_on), indent=2, ensure_ascii=False
            )
            write_whole(self._path, lambda path: path.write_text(text + "\n", encoding="utf-8"))
            yield

    def _merged(
        self, written: Mapping[str, Any], contents: Mapping[str, str], goes_on: bool
    ) -> dict[str, Any]:
        """What the folder's results are of, with what is to join them."""
        before: dict[str, Any] = {"settings": {}, "contents": {}}
        if goes_on:
            before = json.loads(self._path.read_text("utf-8"))
            self._require_same(before["settings"], written)
            for key in before["contents"].keys() & contents.keys():
                if before["contents"][key] != contents[key]:
                    raise UserError(f"--out {self._out}: holds results of another content of {key}")
        merged = {n: {**before["settings"].get(n, {}), **written.get(n, {})} for n in NAMED}
        return {
            "settings": {**written, **merged},
            "contents": {**before["contents"], **contents},
        }

    def _require_same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for key in dict.fromkeys([*before, *now]):
            if key in NAMED:
                for name in before.get(key, {}).keys() & now.get(key, {}).keys():
                    was, given = (_without_values(each[key][name]) for each in (before, now))
                    self._refuse_other(f"{key}.{name}", was, given)
            elif key not in GROWING:
                self._refuse_other(key, before.get(key), now.get(key))

    def _refuse_other(self, key: str, was: Any, given: Any) -> None:
        if was != given:
            raise UserError(
                f"--out {self._out}: holds results with {key} = {json.dumps(was)}, not "
                f"{json.dumps(given)}; name another folder"
            )


@contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder; one that was killed keeps nobody."""
    with (out / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"--out {out}: another comparison writes to it ({file.read().strip()}); wait for "
                "it, or name another folder"
            ) from error
        except OSError:  # a file system that has no locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def _without_values(section: Any) -> Any:
    """A section of what is named, without what may grow in it."""
    if not isinstance(section, dict):
        return {}
    found = {k: v for k, v in section.items() if k not in (DIAL, INTERPOLATED)}
    dial = section.get(DIAL)
    return found | ({DIAL: list(dial) if isinstance(dial, dict) else dial} if dial else {})
