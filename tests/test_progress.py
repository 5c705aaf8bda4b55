"""Progress: a bar in a terminal, lines now and then in a log file, nothing on other ranks."""

import importlib
import io
import sys

import pytest

from spectral_ds.console.progress import progress

module = importlib.import_module("spectral_ds.console.progress")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def written(monkeypatch, file, is_shown=True):
    """What 3 of 4 groups write, one second each."""
    now = iter(range(100))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(sys, "stderr", file)
    with progress("eigenpairs", 4, "group", is_shown) as update:
        for _ in range(3):
            update(1)
    monkeypatch.undo()
    return file.getvalue()


def test_a_terminal_gets_a_bar(monkeypatch):
    found = written(monkeypatch, Terminal())
    assert found.count("\n") == 1
    first, *_, last = found.strip().split("\r")
    assert first.startswith("spectral_ds: eigenpairs:   0%")
    assert "3/4" in last


def test_a_log_file_gets_whole_lines_now_and_then(monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 2.0)
    assert written(monkeypatch, io.StringIO()) == (
        "spectral_ds: eigenpairs: 2 of 4 groups after 2 s, about 2 s left\n"
    )


def test_short_work_writes_nothing_into_a_log_file(monkeypatch):
    assert written(monkeypatch, io.StringIO()) == ""


@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_other_ranks_write_nothing(monkeypatch, file):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 2.0)
    assert written(monkeypatch, file(), is_shown=False) == ""
