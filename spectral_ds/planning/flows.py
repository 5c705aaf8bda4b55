"""Flows: what each rank sends and receives, and how much of it stays within its machine."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spectral_ds.planning.layouts import Ints

Floats = npt.NDArray[np.float64]

FLOAT = 4  # bytes of a float32, in which all arithmetic is done


@dataclass(frozen=True)
class Cluster:
    """Ranks on machines of equal size, in order.

    Attributes:
        world_size: a multiple of `machines`.
    """

    world_size: int
    machines: int

    @property
    def ranks_per_machine(self) -> int:
        return self.world_size // self.machines

    def machine(self, ranks: Ints) -> Ints:
        """Where each rank runs."""
        return ranks // self.ranks_per_machine

    def by_rank(self, ranks: Ints, values: npt.NDArray[np.generic]) -> Floats:
        """Sums of values by rank; (world size,)."""
        return np.bincount(ranks, values, self.world_size).astype(np.float64)


@dataclass(frozen=True)
class Flow:
    """Elements or bytes by rank, (world size,) each: whole numbers where the graph is known.

    Attributes:
        sent, received: to and from other ranks.
        sent_near, received_near: of them, to and from ranks on the same machine.
    """

    sent: Floats
    received: Floats
    sent_near: Floats
    received_near: Floats

    @classmethod
    def none(cls, cluster: Cluster) -> "Flow":
        return cls.none_like(np.zeros(cluster.world_size))

    @classmethod
    def none_like(cls, by_rank: Floats) -> "Flow":
        """Nothing, for as many ranks."""
        zeros = np.zeros_like(by_rank)
        return cls(zeros, zeros, zeros, zeros)

    @classmethod
    def of_pairs(cls, source: Ints, target: Ints, elements: Floats, cluster: Cluster) -> "Flow":
        """The flow of (source rank, target rank, elements) triples."""
        near = elements * (cluster.machine(source) == cluster.machine(target))
        return cls(
            cluster.by_rank(source, elements),
            cluster.by_rank(target, elements),
            cluster.by_rank(source, near),
            cluster.by_rank(target, near),
        )

    def __add__(self, other: "Flow") -> "Flow":
        return Flow(
            self.sent + other.sent,
            self.received + other.received,
            self.sent_near + other.sent_near,
            self.received_near + other.received_near,
        )

    def __mul__(self, factor: float) -> "Flow":
        return Flow(
            self.sent * factor,
            self.received * factor,
            self.sent_near * factor,
            self.received_near * factor,
        )

    @property
    def total(self) -> int:
        """What all ranks together send."""
        return round(float(self.sent.sum()))

    @property
    def near(self) -> Floats:
        """Within the machine, the busier direction of each rank."""
        return np.maximum(self.sent_near, self.received_near)

    @property
    def far(self) -> Floats:
        """Across machines, the busier direction of each rank."""
        return np.maximum(self.sent - self.sent_near, self.received - self.received_near)
