"""Files that have their name only when they are complete."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

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
        try:
            write(unfinished)
        except SafetensorError as error:  # as safetensors says that a disk is full
            raise OSError(errno.EIO, str(error)) from error
        if target.exists():
            shutil.copymode(target, unfinished)
        os.replace(unfinished, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise
