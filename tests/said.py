"""What the package logs in this process, on a rank too."""

import contextlib
import logging


@contextlib.contextmanager
def messages(level=logging.WARNING):
    """A list that gets what is logged meanwhile."""
    found, handler = [], logging.Handler(level)
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("spectral_ds")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
