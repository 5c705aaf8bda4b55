"""What the plugin needs to go on after a restart, in files or in a distributed checkpoint.

`state.py` says what a part of the state is, alike for all engines; parts are owned by what filters,
and `persistence.py` collects and restores them; `folder.py` keeps the state in safetensors beside
the engine's own files; `distributed.py` turns it into tensors for `torch.distributed.checkpoint`.
"""

from spectral_ds.checkpoint.persistence import Persistence
from spectral_ds.checkpoint.state import (
    CheckpointError,
    Part,
    PartState,
    Pieces,
    PluginState,
    Restoration,
    SavedState,
    numbers_below,
)

__all__ = [
    "CheckpointError",
    "Part",
    "PartState",
    "Persistence",
    "Pieces",
    "PluginState",
    "Restoration",
    "SavedState",
    "numbers_below",
]
