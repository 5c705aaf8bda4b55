"""What the package says while it runs: messages by a logger, progress of long work."""

from spectral_ds.console.messages import logger
from spectral_ds.console.progress import progress

__all__ = ["logger", "progress"]
