"""Runs of `spectral-ds compare` that fail or are killed: named, and no process stays behind."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time

import psutil
import pytest
from compared import cells, compare, rows_of, write_config, write_inputs

from spectral_ds.cli.compare import pool
from spectral_ds.cli.compare.settings import load
from spectral_ds.cli.compare.state import State, contents_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare")
    write_inputs(path)
    return path


def test_a_run_that_fails_is_named_and_others_go_on(folder, capsys):
    methods = {
        "adamw": None,
        "biases": {"adapter": "bitfit"},
        "typo": {"optimizer": "projection_decay", "options": {"strenght": 1}},
        "merge typo": {"after": "adamw", "by": "merge", "options": {"mux": 1}},
    }
    tasks = {"words": {"data": str(folder / "task.tsv"), "steps": 1}}
    config = write_config(folder, "causal-lm", "fails", methods=methods, seeds=[0], tasks=tasks)
    out = folder / "fails"
    assert compare(config, out, "--workers", "0") == 1
    said = capsys.readouterr().out
    assert "words-biases-0.01-0 failed: adapter = bitfit" in said
    assert "words-typo-0.01-0 failed: methods.typo.options = {'strenght': 1}" in said
    assert "words-adamw-0.01-0 failed: options of merge: unrecognized arguments: --mux" in said
    assert "Traceback" not in said
    assert len(cells(rows_of(out), "adamw")) == 3


def test_a_run_that_is_killed_is_named_and_leaves_no_process(
    folder, capsys, monkeypatch, processes
):
    config = write_config(folder, name="killed", methods={"adamw": None})
    out, before = folder / "killed", set(multiprocessing.active_children())
    monkeypatch.setattr(pool, "_child", _killed)
    assert compare(config, out, "--workers", "2") == 1
    said = capsys.readouterr().out
    for seed in (0, 1):
        assert f"words-adamw-0.01-{seed} failed: ended with status -9" in said
    assert set(multiprocessing.active_children()) <= before
    assert rows_of(out) == []
    assert compare(config, out, "--report") == 2
    assert f"{out / 'results.csv'} has no row of baseline = adamw" in capsys.readouterr().err


def test_a_folder_takes_one_comparison_at_a_time_and_none_that_was_killed(
    folder, capsys, processes
):
    config = write_config(folder, name="once", methods={"adamw": None}, seeds=[0])
    out = folder / "once"
    assert compare(config, out, "--workers", "0") == 0
    rows = rows_of(out)
    more = ("--resume", "--workers", "0", "seeds=[0,1]")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    other = context.Process(target=_holding, args=(config, out, theirs))
    other.start()
    assert ours.poll(20)
    assert ours.recv() == "begun"
    capsys.readouterr()
    assert compare(config, out, *more) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"--out {out}: another comparison writes to it (process {other.pid} on " in line
    assert rows_of(out) == rows
    assert compare(config, out, "--report") == 0
    other.kill()
    other.join()
    assert compare(config, out, *more) == 0
    assert len(rows_of(out)) == 2 * len(rows)


def _holding(config, out, connection):
    comparison, written = load(config, [], False)
    with State(out).begun(written, contents_of(comparison), True, True):
        connection.send("begun")
        time.sleep(60)


def _killed(job, place, connection):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_whose_parent_was_killed_ends(tmp_path, processes):
    context = multiprocessing.get_context("fork")
    parent = context.Process(target=_with_child, args=(context, tmp_path / "pid"))
    parent.start()
    until = time.monotonic() + 20
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    child = psutil.Process(int((tmp_path / "pid").read_text()))
    parent.kill()
    parent.join()
    with contextlib.suppress(psutil.NoSuchProcess):
        until = time.monotonic() + 20
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until
            time.sleep(0.05)


def _with_child(context, file):
    context.Process(target=_waiting_child, args=(file,)).start()
    time.sleep(60)


def _waiting_child(file):
    threading.Thread(target=pool._end_with_parent, daemon=True).start()
    file.with_suffix(".new").write_text(str(os.getpid()))
    file.with_suffix(".new").rename(file)
    time.sleep(60)
