"""DeepSpeed's own checkpoints carry the plugin's state, in `<tag>/spectral_ds`.

`save_checkpoint` and `load_checkpoint` of the user's engine are wrapped.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spectral_ds.engines.deepspeed_direct import DirectSteps
from spectral_ds.engines.hooks import WrappedMethod

# In a checkpoint: the folder of the plugin's state, and its mark in the client state.
FOLDER = "spectral_ds"
# In the mark: the steps that DeepSpeed has not counted.
DIRECT = "direct_steps"


class DeepSpeedCheckpoints:
    """An `EngineCheckpoints` of a DeepSpeed engine.

    The state is written before DeepSpeed's own files, and these before DeepSpeed names the newest
    tag. A crash on the way leaves the newest tag as it was, if the tag being written is another. If
    a tag is written again, a crash may leave the state of one step with files of another, which
    `load` refuses.
    """

    def __init__(self, engine: Any, direct: DirectSteps) -> None:
        self._engine, self._direct = engine, direct
        self._handles: list[WrappedMethod] = []

    def carry(
        self,
        save: Callable[[Path], None],
        load: Callable[[Path, bool, int], None],
        begin_anew: Callable[[], None],
    ) -> None:
        self._handles += [
            WrappedMethod(self._engine, "save_checkpoint", self._saving(save)),
            WrappedMethod(self._engine, "load_checkpoint", self._loading(load, begin_anew)),
        ]

    def remove(self) -> None:
        """Restore both methods."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _saving(self, save: Callable[[Path], None]) -> Callable[..., Any]:
        """What takes the place of `save_checkpoint`."""

        def save_checkpoint(
            original: Callable[..., Any],
            save_dir: Any,
            tag: Any = None,
            client_state: Mapping[str, Any] | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            tag = f"global_step{self._engine.global_steps}" if tag is None else tag
            save(Path(save_dir, str(tag), FOLDER))
            mark = {"tag": str(tag), DIRECT: self._direct.taken}
            marked = {**(client_state or {}), FOLDER: mark}
            return original(save_dir, tag, marked, *args, **kwargs)

        return save_checkpoint

    def _loading(
        self, load: Callable[[Path, bool, int], None], begin_anew: Callable[[], None]
    ) -> Callable[..., Any]:
        """What takes the place of `load_checkpoint`."""
        signature = inspect.signature(self._engine.load_checkpoint)

        def load_checkpoint(
            original: Callable[..., Any], load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any
        ) -> Any:
            path, client_state = original(load_dir, tag, *args, **kwargs)
            given = signature.bind(load_dir, tag, *args, **kwargs).arguments
            if path is None:
                return path, client_state
            if given.get("load_module_only", False):  # DeepSpeed does not set its step either
                begin_anew()
                return path, client_state
            mark = (client_state or {}).get(FOLDER)
            folder = Path(path).parent / FOLDER
            if mark and not folder.is_dir():
                # A universal checkpoint lies beside the one that it was made from.
                folder = Path(load_dir, mark["tag"], FOLDER)
            self._direct.taken = (mark or {}).get(DIRECT, 0)
            load(folder, mark is not None, int(self._engine.global_steps) + self._direct.taken)
            return path, client_state

        return load_checkpoint
