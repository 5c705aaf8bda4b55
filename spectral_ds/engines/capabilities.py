"""What an engine may be able to do besides training: each is None where it is not.

`Engine.monitor` writes scalars, `Engine.checkpoints` carries the plugin's state in the engine's own
checkpoints, `Engine.tensors` hands it to `torch.distributed.checkpoint`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from spectral_ds.sharding import Fragment


class EngineMonitor(Protocol):
    """The engine's own monitor, switched on."""

    @property
    def summary_writer(self) -> Any:
        """Its `SummaryWriter`; None without TensorBoard, and on all ranks but 0."""

    def write(self, metrics: Mapping[str, float]) -> None:
        """Write scalars by name, under `spectral_ds/`: rank 0 writes, others do nothing."""


class EngineCheckpoints(Protocol):
    """Checkpoints that the engine makes itself."""

    def carry(
        self,
        save: Callable[[Path], None],
        load: Callable[[Path, bool, int], None],
        begin_anew: Callable[[], None],
    ) -> None:
        """Have them carry the plugin's state, until the engine's `remove`.

        Args:
            save: writes the state into a folder of the checkpoint (collective).
            load: reads it (collective); is also told whether the checkpoint says that it has one,
                and the step that the engine has restored from it.
            begin_anew: called when the engine has loaded weights alone (collective).
        """


class DistributedTensors(Protocol):
    """How `torch.distributed.checkpoint` sees what is laid out like the parameters."""

    def wrap(self, fragment: Fragment, values: torch.Tensor) -> Any:
        """A tensor that is saved as the shards of the fragment's parameter are.

        Args:
            fragment: one of the engine's `fragments`.
            values: float32, flat, of the fragment's length.
        """

    def local_part(self, tensor: Any) -> torch.Tensor:
        """This rank's part, flat, of a tensor from `wrap`, or of one that is whole everywhere."""
