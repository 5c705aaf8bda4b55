"""Folders of TensorBoard files: each optimizer of a process writes to one of its own.

In one folder, TensorBoard draws what two models write under the same tags as one curve.
"""

import itertools
import os
import weakref
from typing import Any

from spectral_ds.config import SpectralConfigError

# By the path of a folder, the optimizer and the writer that have it. An optimizer that is gone
# keeps it, since its curves stay.
_taken: "dict[str, tuple[weakref.ref[Any], weakref.ref[Any]]]" = {}


def writer_of_its_own(folder: str, optimizer: object) -> Any:
    """A `SummaryWriter` to the folder or, if that is taken, to the first free `optimizer_N` in it.

    Args:
        folder: that the user named.
        optimizer: may go on in a folder of its own whose writer is closed.

    Raises:
        SpectralConfigError: it cannot be written to.
    """
    from torch.utils.tensorboard import SummaryWriter

    own, numbers = folder, itertools.count(2)
    while _is_taken(own, optimizer):
        own = os.path.join(folder, f"optimizer_{next(numbers)}")
    try:
        writer = SummaryWriter(own)
    except OSError as error:
        raise SpectralConfigError(
            f"spectral_ds.monitor.folder: cannot write to {own!r}: {error}"
        ) from error
    _taken[os.path.realpath(own)] = weakref.ref(optimizer), weakref.ref(writer)
    return writer


def _is_taken(folder: str, optimizer: object) -> bool:
    held = _taken.get(os.path.realpath(folder))
    if held is None:
        return False
    owner, writer = (reference() for reference in held)
    is_closed = writer is None or writer.file_writer is None
    return owner is not optimizer or not is_closed
