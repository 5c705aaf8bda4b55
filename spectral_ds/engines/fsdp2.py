"""FSDP2 (`fully_shard`) and HSDP: a `TorchEngine` with DTensors cut along dimension 0."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from spectral_ds.engines.capabilities import DistributedTensors
from spectral_ds.engines.torch_engine import TorchEngine
from spectral_ds.engines.views import reason_against_complex
from spectral_ds.sharding import Communicator, Fragment


class FSDP2Engine(TorchEngine):
    """One fragment a parameter: the rows of this rank's shard.

    Under HSDP, replicas hold identical shards, so rows are exchanged along the shard axis only.
    `everyone` is all ranks of the mesh.
    """

    _mesh: Any = None  # of all parameters
    _axis = 0  # that shards them
    _way_out = (
        "; if it was made after a forward pass without a backward one, it has the parameters that "
        "this has gathered: make it before, or after reshard() of the module"
    )

    @staticmethod
    def recognizes(model: torch.nn.Module) -> bool:
        from torch.distributed.tensor import DTensor

        # After a forward pass without a backward one, the parameters of the root are whole.
        return bool(sharded_modules(model)) or any(
            isinstance(parameter, DTensor) for parameter in model.parameters()
        )

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        for module in sharded_modules(self.module):
            module.reshard()  # the next forward pass gathers again
        return super()._trained()

    def _reason_against(self, parameter: torch.Tensor) -> str | None:
        from torch.distributed.tensor import DTensor

        if (reason := reason_against_complex(parameter, "FSDP2")) is not None:
            return reason
        if not isinstance(parameter, DTensor):
            return (
                "is not sharded by fully_shard, others are; apply fully_shard to the root module "
                "too"
            )
        placements = tuple(parameter.placements)
        if (axis := _shard_axis(placements)) is None:
            return (
                f"is placed {placements}; supported are shards along dimension 0 of one mesh axis, "
                "and replicas"
            )
        if self._mesh is None:
            self._mesh, self._axis = parameter.device_mesh, axis
        if parameter.device_mesh != self._mesh or axis != self._axis:
            return "is sharded over another device mesh than the others"
        return super()._reason_against(parameter)

    def _find_ranks(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        mesh = self._mesh
        assert mesh is not None, "there is a parameter"
        device = torch.device(mesh.device_type)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        self.everyone = Communicator(_group_of_all_axes(mesh), device)
        self.communicator = Communicator(mesh.get_group(self._axis), device)

    def _fragment(self, name: str, parameter: torch.nn.Parameter) -> Fragment:
        return _fragment(name, parameter, self.communicator)

    def _tensors(self) -> DistributedTensors:
        return ShardedTensors(self._parameters)

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


def sharded_modules(model: torch.nn.Module) -> list[Any]:
    """The modules to which `fully_shard` was applied, in model order."""
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _shard_axis(placements: Sequence[Any]) -> int | None:
    """The mesh axis along which dimension 0 is sharded; None unless all other axes replicate."""
    axes = [axis for axis, placement in enumerate(placements) if placement.is_shard(0)]
    others = [p for p in placements if not p.is_shard(0) and not p.is_replicate()]
    return axes[0] if len(axes) == 1 and not others else None


def _group_of_all_axes(mesh: Any) -> Any:
    """The process group of a mesh's ranks; None if these are all (collective on the mesh)."""
    if mesh.size() == dist.get_world_size():
        return None
    if mesh.ndim == 1:
        return mesh.get_group(0)
    ranks = mesh.mesh.flatten().tolist()
    return dist.new_group(sorted(ranks), use_local_synchronization=True)


def _fragment(name: str, parameter: torch.Tensor, communicator: Communicator) -> Fragment:
    """The rows of a rank: chunks of equal length, the last ones shorter or empty."""
    rows = parameter.shape[0]
    width = parameter.numel() // rows
    chunk = -(-rows // communicator.world_size)
    first = min(chunk * communicator.rank, rows)
    last = min(first + chunk, rows)
    return Fragment(name, first * width, (last - first) * width)
