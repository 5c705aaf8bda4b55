"""Files that have their name only when they are complete."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

UNFINISHED = ".unfinished"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file, or leave what is there as it is, and nothing beside it.

    Args:
        path: of the file; where a link points stays where it is, and keeps its permissions.
        write: is given the path to write to, in the same folder.

    Raises:
        OSError: it cannot be written; names the file.
    """
    target = path.resolve()
    unfinished = target.with_name(target.name + UNFINISHED)
    try:
        write(unfinished)
        if target.exists():
            shutil.copymode(target, unfinished)
        os.replace(unfinished, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise
