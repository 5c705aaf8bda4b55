"""Pool: several jobs at once, each in a process of its own that ends with it.

So the memory of each is its own, and one that is killed takes nothing with it.
"""

import logging
import multiprocessing
import os
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from spectral_ds.cli.compare.job import Job, Tell, Workplace, work
from spectral_ds.cli.errors import UserError
from spectral_ds.console import logger

# Of messages from a job: rows of a table, or why it failed.
FAILED = "failed"
SECONDS_TO_END = 5.0
# glibc gives large blocks back at once and asks for them anew: page faults took a third of a step.
KEEPS_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}
# Imported once, by the process that all jobs are forked from.
PRELOADED = ["spectral_ds.cli.compare.job", "spectral_ds.attach", "transformers"]


class Failure(NamedTuple):
    """A job that has no result, and why."""

    job: Job
    reason: str


def run_jobs(
    jobs: Sequence[Job],
    place: Workplace,
    workers: int,
    take: Tell,
) -> list[Failure]:
    """Do all jobs, in order as workers are free.

    Args:
        workers: processes at once; 0: all in this one, one after another.
        take: gets the name of a table and rows of it.

    Returns:
        Those that failed.
    """
    if workers == 0:
        return [failure for job in jobs if (failure := _done_here(job, place, take))]
    # Of numpy's linear algebra too, which is told before it is imported.
    os.environ["OMP_NUM_THREADS"] = str(place.threads)
    context: Any = multiprocessing.get_context("forkserver" if place.device == "cpu" else "spawn")
    if place.device == "cpu":
        os.environ.update({**KEEPS_MEMORY, **os.environ})
        multiprocessing.set_forkserver_preload(PRELOADED)
    waiting, failures = list(jobs), []
    running: dict[Connection, tuple[Job, BaseProcess]] = {}
    with _ended(running):
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(job, place, theirs), daemon=True)
                process.start()
                theirs.close()
                running[ours] = job, process
            for connection in wait(list(running)):
                assert isinstance(connection, Connection), "of a pipe"
                job, process = running[connection]
                try:
                    table, content = connection.recv()
                except EOFError:
                    process.join()
                    del running[connection]
                    if process.exitcode:
                        failures.append(Failure(job, f"ended with status {process.exitcode}"))
                    continue
                if table == FAILED:
                    failures.append(Failure(job, content))
                else:
                    take(table, content)
    return failures


def _done_here(job: Job, place: Workplace, take: Tell) -> Failure | None:
    reason = _reason_of_failure(job, place, take)
    return None if reason is None else Failure(job, reason)


@contextmanager
def _ended(running: dict[Connection, tuple[Job, BaseProcess]]) -> Iterator[None]:
    """No process is left, whatever happens."""
    try:
        yield
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join(SECONDS_TO_END)
            if process.is_alive():
                process.kill()


def _child(job: Job, place: Workplace, connection: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logger.setLevel(logging.WARNING)  # the same of every run is no news
    warnings.simplefilter("ignore", FutureWarning)  # of transformers to itself
    reason = _reason_of_failure(job, place, lambda table, rows: connection.send((table, rows)))
    if reason is not None:
        connection.send((FAILED, reason))


def _end_with_parent() -> None:
    """A run whose results nobody takes any more ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _reason_of_failure(job: Job, place: Workplace, take: Tell) -> str | None:
    """Do a job; why it failed, or None."""
    try:
        work(job, place, take)
    except UserError as error:
        return str(error)
    except Exception:  # others go on; whoever reads it finds the cause there
        return traceback.format_exc()
    return None
