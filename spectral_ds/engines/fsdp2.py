"""FSDP2 (`fully_shard`) and HSDP: a `TorchEngine` with DTensors cut along dimension 0."""

from collections.abc import Mapping
from typing import Any

import torch

from spectral_ds.engines.base import UnsupportedEngineError
from spectral_ds.engines.torch_engine import TorchEngine
from spectral_ds.engines.views import refuse_complex
from spectral_ds.sharding import Communicator, Fragment


class FSDP2Engine(TorchEngine):
    """One fragment a parameter: the rows of this rank's shard.

    Under HSDP, replicas hold identical shards, so rows are exchanged along the shard axis only.
    """

    @staticmethod
    def recognizes(model: torch.nn.Module) -> bool:
        from torch.distributed.tensor import DTensor

        return any(isinstance(parameter, DTensor) for parameter in model.parameters())

    def _find_shards(self) -> None:
        from torch.distributed.tensor import DTensor

        refuse_complex(self._parameters.items(), "FSDP2")
        mesh, axis = None, 0
        for name, parameter in self._parameters.items():
            if not isinstance(parameter, DTensor):
                raise UnsupportedEngineError(
                    f"parameter {name!r} is not sharded by fully_shard, others are; "
                    "apply fully_shard to the root module too"
                )
            if mesh is None:
                mesh = parameter.device_mesh
                axis = _shard_axis(name, parameter)
            if parameter.device_mesh != mesh or _shard_axis(name, parameter) != axis:
                raise UnsupportedEngineError(
                    f"parameter {name!r} is sharded over another device mesh than the others"
                )
        assert mesh is not None, "there is a parameter"
        collective_device = torch.device(mesh.device_type)
        if collective_device.type == "cuda":
            collective_device = torch.device("cuda", torch.cuda.current_device())
        self.everyone = Communicator(None, collective_device)
        self.communicator = Communicator(mesh.get_group(axis), collective_device)
        self.fragments = [
            _fragment(name, parameter, self.communicator)
            for name, parameter in self._parameters.items()
        ]
        self.tensors = ShardedTensors(self._parameters)

    def _local(self, tensor: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import DTensor

        assert isinstance(tensor, DTensor), "checked at attach"
        return tensor.to_local().view(-1)


class ShardedTensors:
    """`DistributedTensors` as DTensors laid out like the parameters.

    Args:
        parameters: DTensors, by name.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._parameters = parameters

    def wrap(self, fragment: Fragment, values: torch.Tensor) -> Any:
        from torch.distributed.tensor import DTensor

        parameter = self._parameters[fragment.parameter]
        assert isinstance(parameter, DTensor), "checked at attach"
        return DTensor.from_local(
            values.view(parameter.to_local().shape),
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def local_part(self, tensor: Any) -> torch.Tensor:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        flat: torch.Tensor = local.reshape(-1)
        return flat


def _shard_axis(name: str, parameter: torch.Tensor) -> int:
    """The mesh axis along which dimension 0 is sharded; all other axes must replicate."""
    placements = list(getattr(parameter, "placements", ()))
    axes = [axis for axis, placement in enumerate(placements) if placement.is_shard(0)]
    others = [p for p in placements if not p.is_shard(0) and not p.is_replicate()]
    if len(axes) != 1 or others:
        raise UnsupportedEngineError(
            f"parameter {name!r} is placed {tuple(placements)}; supported are shards along "
            "dimension 0 of one mesh axis, and replicas"
        )
    return axes[0]


def _fragment(name: str, parameter: torch.Tensor, communicator: Communicator) -> Fragment:
    """The rows of a rank: chunks of equal length, the last ones shorter or empty."""
    rows = parameter.shape[0]
    width = parameter.numel() // rows
    chunk = -(-rows // communicator.world_size)
    first = min(chunk * communicator.rank, rows)
    last = min(first + chunk, rows)
    return Fragment(name, first * width, (last - first) * width)
