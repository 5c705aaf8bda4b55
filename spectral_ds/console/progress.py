"""Progress of long work on rank 0: a bar in a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0


@contextmanager
def progress(what: str, total: int, unit: str, is_shown: bool) -> Iterator[Callable[[int], object]]:
    """Gives a function to call with the number of units done since its last call.

    Args:
        what: of what, for people.
        total: units in all.
        unit: their name.
        is_shown: whether this rank shows anything.
    """
    if not is_shown or sys.stderr.isatty():
        with tqdm(
            total=total, desc=f"spectral_ds: {what}", unit=unit, disable=not is_shown, mininterval=1
        ) as bar:
            yield bar.update
        return
    started = last = time.monotonic()
    done = 0

    def update(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            passed = now - started
            line = f"spectral_ds: {what}: {done} of {total} {unit}s after {passed:.0f} s"
            if 0 < done < total:
                line += f", about {passed / done * (total - done):.0f} s left"
            print(line, file=sys.stderr, flush=True)

    yield update
