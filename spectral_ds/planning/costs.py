"""What a filter costs: arithmetic, memory traffic, time.

Time is traffic over the bandwidth of memory, or operations over arithmetic where that is more, plus
what is sent over the bandwidth of the link it takes, plus a latency a collective. Products with L
are bound by memory; those with active directions may not be.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spectral_ds.laplacian import Work
from spectral_ds.planning.flows import FLOAT, Cluster, Floats, Flow
from spectral_ds.planning.packs import Pack

INDEX = 4  # bytes of a column index


@dataclass(frozen=True)
class Machine:
    """What a rank's hardware gives, and what a step is besides the filter.

    Attributes:
        intra, inter: bytes a second that a rank sends within its machine, and across.
        memory: bytes a second that a rank reads and writes.
        latency: seconds of a collective, however little it sends.
        arithmetic: operations a second in float32.
    """

    intra: float = 300e9
    inter: float = 40e9
    memory: float = 2.5e12
    latency: float = 30e-6
    arithmetic: float = 60e12


@dataclass(frozen=True)
class Cost:
    """What a part of a step takes of each rank; (world size,) each.

    Attributes:
        flow: bytes that travel.
        flops: additions and multiplications.
        traffic: bytes read and written.
        collectives: how many.
    """

    flow: Flow
    flops: Floats
    traffic: Floats
    collectives: int

    @classmethod
    def of_elements(cls, elements: Floats, bytes_each: float, cluster: Cluster) -> "Cost":
        """The cost of a pass over elements that sends nothing, an operation each."""
        return cls(Flow.none(cluster), elements, bytes_each * elements, 0)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flow + other.flow,
            self.flops + other.flops,
            self.traffic + other.traffic,
            self.collectives + other.collectives,
        )

    def computing(self, machine: Machine) -> Floats:
        """Seconds that each rank's memory, or its arithmetic, is busy."""
        return np.maximum(self.traffic / machine.memory, self.flops / machine.arithmetic)

    def communicating(self, machine: Machine) -> Floats:
        """Seconds that each rank's links are busy."""
        busy = self.flow.near / machine.intra + self.flow.far / machine.inter
        return busy + self.collectives * machine.latency


def function_cost(
    packs: Sequence[Pack], work: Work, transpositions: int, exchange_bytes: int, cluster: Cluster
) -> Cost:
    """The cost of one function of L that takes so much work.

    Args:
        transpositions: collectives that bring a signal to where it is transposed.
        exchange_bytes: of an element that travels.
    """
    zeros = np.zeros(cluster.world_size)
    total = Cost(Flow.none(cluster), zeros, zeros, work.transposes * transpositions)
    for pack in packs:
        if pack.is_dense:
            elements = pack.rows * pack.columns
            flops, traffic = 2 * pack.rows * elements, 2 * FLOAT * elements
            hop = Cost(Flow.none(cluster), flops, traffic, 0)
        else:
            assert work.hops is not None, "what has no series is nowhere exchanged by boundary rows"
            hop = _times(_product(pack, exchange_bytes), work.hops)
        total = total + hop + _times(_transpose(pack, exchange_bytes), work.transposes)
    return total


def _product(pack: Pack, exchange_bytes: int) -> Cost:
    """T ← 2 L̃ T' − T'', out ← out + c T, and the boundary before it."""
    elements = pack.rows * pack.columns
    gathered = pack.links * pack.columns
    hop = pack.hop
    return Cost(
        hop * exchange_bytes,
        2 * gathered + 2 * elements,
        # A read for each nonzero number, and T'', T, T again, out.
        FLOAT * (gathered + 5 * elements)
        + (FLOAT + INDEX) * pack.links
        + (FLOAT + exchange_bytes) * (hop.sent + hop.received),
        pack.slices if hop.total > 0 else 0,
    )


def _transpose(pack: Pack, exchange_bytes: int) -> Cost:
    """Own elements to scratch memory or back, by way of other ranks' where transposed."""
    own = sum((group.elements for group in pack.groups), np.zeros_like(pack.rows))
    flow = pack.transpose
    passing = flow.sent + flow.received
    traffic = 2 * FLOAT * own + (FLOAT + exchange_bytes) * passing
    return Cost(flow * exchange_bytes, np.zeros_like(own), traffic, 0)


def _times(cost: Cost, count: int) -> Cost:
    return Cost(
        cost.flow * count, cost.flops * count, cost.traffic * count, cost.collectives * count
    )
