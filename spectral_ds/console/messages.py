"""What the package tells its users: the logger `spectral_ds`, which shows INFO too.

DeepSpeed's own logger shows warnings alone. Who configures logging has the messages there;
`logging.getLogger("spectral_ds").setLevel("WARNING")` silences the rest.
"""

import logging

logger = logging.getLogger("spectral_ds")


class _LastResort(logging.StreamHandler):  # type: ignore[type-arg]
    """To stderr, unless the application has handlers of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)


def _prepare() -> None:
    if not logger.handlers:
        handler = _LastResort()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


_prepare()
