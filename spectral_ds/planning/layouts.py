"""How engines cut parameters into shards, from shapes alone.

In: shapes, and the number of ranks. Out: for each parameter, which rank owns which run of it, by
the rules of the engines' own code.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from spectral_ds.sharding import Fragment, ShardLayout

EngineName = Literal["zero1", "zero2", "zero3", "fsdp2"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
# DeepSpeed's nccl_start_alignment_factor: a flat group is padded to a multiple of it a rank.
ALIGNMENT = 2

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Cuts:
    """Who owns which run of one flattened parameter; parameters cut alike may share one.

    Attributes:
        bounds: (runs + 1,), ascending, from 0 to the parameter's size.
        rank: (runs,), ascending: the owner of each run; no run is empty.
    """

    bounds: Ints
    rank: Ints

    def owner(self, elements: Ints) -> Ints:
        """The rank that owns each element."""
        return self.rank[np.searchsorted(self.bounds, elements, side="right") - 1]


def cut_parameters(
    engine: EngineName,
    shapes: Mapping[str, tuple[int, ...]],
    world_size: int,
    groups: Sequence[Sequence[str]] | None = None,
) -> dict[str, Cuts]:
    """How an engine cuts parameters.

    Args:
        shapes: of all trainable parameters, in model order.
        groups: names of the optimizer's parameter groups, in its order, where DeepSpeed lays them
            out one after another (ZeRO-1 and 2); by default one group in model order.
    """
    if engine in ("zero1", "zero2"):
        cuts: dict[str, Cuts] = {}
        for group in groups or [list(shapes)]:
            cuts |= _flat_partitions({name: math.prod(shapes[name]) for name in group}, world_size)
        return {name: cuts[name] for name in shapes}
    rule = _equal_runs if engine == "zero3" else _row_chunks
    by_shape = {shape: rule(shape, world_size) for shape in set(shapes.values())}
    return {name: by_shape[shape] for name, shape in shapes.items()}


def shard_layout(cuts: Mapping[str, Cuts], world_size: int, rank: int = 0) -> ShardLayout:
    """Cuts as the fragments of every rank, parameter after parameter."""
    fragments: list[list[Fragment]] = [[] for _ in range(world_size)]
    for name, cut in cuts.items():
        for owner, start, end in zip(cut.rank, cut.bounds[:-1], cut.bounds[1:], strict=True):
            fragments[owner].append(Fragment(name, int(start), int(end - start)))
    return ShardLayout(tuple(map(tuple, fragments)), rank)


def _flat_partitions(sizes: Mapping[str, int], world_size: int) -> dict[str, Cuts]:
    """ZeRO-1 and 2: one parameter after another, padded, cut into equal partitions."""
    alignment = ALIGNMENT * world_size
    partition = -(-sum(sizes.values()) // alignment) * ALIGNMENT
    cuts, first = {}, 0
    for name, size in sizes.items():
        rank = np.arange(first // partition, (first + size - 1) // partition + 1)
        bounds = np.append(rank, rank[-1] + 1) * partition - first
        cuts[name] = Cuts(bounds.clip(0, size), rank)
        first += size
    return cuts


def _equal_runs(shape: tuple[int, ...], world_size: int) -> Cuts:
    """ZeRO-3: every parameter, padded, cut into equal runs."""
    size = math.prod(shape)
    return _runs(size, -(-size // world_size))


def _row_chunks(shape: tuple[int, ...], world_size: int) -> Cuts:
    """FSDP2: chunks of rows along dimension 0, as `torch.chunk` cuts them."""
    size = math.prod(shape)
    return _runs(size, -(-shape[0] // world_size) * (size // shape[0]))


def _runs(size: int, length: int) -> Cuts:
    rank = np.arange(-(-size // length))
    return Cuts(np.append(rank * length, size), rank)
