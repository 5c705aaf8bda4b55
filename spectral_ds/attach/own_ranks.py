"""OwnRanks: ranks that a script starts by itself run under the runner too.

In: how the script was started. Some trainers start the other ranks of a machine by the command of
the script itself. Without the runner, these would not take part in attaching and filtering, and the
first rank would wait for them in vain.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from spectral_ds.engines.hooks import WrappedMethod

RUNNER = "spectral_ds.run"
# What tells a rank from its siblings, whoever starts it.
RANK = "LOCAL_RANK"


class OwnRanks:
    """Starts them as `python -m spectral_ds.run SCRIPT ...`, until `remove`.

    A process is one of them if it is started by this Python with the script, and with a LOCAL_RANK
    other than this process's in the environment that it is given. All others start as they are.

    Args:
        script: absolute path, or name of a module.
        is_module: whether it was started by -m.
    """

    def __init__(self, script: str, is_module: bool) -> None:
        self._script = ["-m", script] if is_module else [script]
        self._handle = WrappedMethod(subprocess.Popen, "__init__", self._start)

    def _start(
        self,
        original: Callable[..., None],
        process: Any,
        args: Any,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        own = [sys.executable, *self._script]
        given = (kwargs.get("env") or {}).get(RANK)
        is_rank = given is not None and given != os.environ.get(RANK)
        if is_rank and isinstance(args, list | tuple) and list(args[: len(own)]) == own:
            args = [sys.executable, "-m", RUNNER, *args[1:]]
        original(process, args, *rest, **kwargs)

    def remove(self) -> None:
        self._handle.remove()
