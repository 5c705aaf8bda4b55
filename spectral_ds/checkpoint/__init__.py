"""What the plugin needs to go on after a restart, in files or in a distributed checkpoint.

`state.py` says what there is, engine by engine alike; `folder.py` keeps it in safetensors beside
the engine's own files; `distributed.py` turns it into tensors for `torch.distributed.checkpoint`.
"""

from spectral_ds.checkpoint.distributed import from_tensors, to_tensors
from spectral_ds.checkpoint.folder import read_state, write_state
from spectral_ds.checkpoint.state import (
    CheckpointError,
    Pieces,
    PluginState,
    SavedState,
    difference_of_graphs,
)

__all__ = [
    "CheckpointError",
    "Pieces",
    "PluginState",
    "SavedState",
    "difference_of_graphs",
    "from_tensors",
    "read_state",
    "to_tensors",
    "write_state",
]
