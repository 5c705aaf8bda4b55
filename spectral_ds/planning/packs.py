"""Packs: groups that the filter works on together, and what that takes of each rank.

The rules are those of `laplacian.packing`, `laplacian.plan`, `laplacian.scratch` and
`laplacian.kernels`, worked out for all ranks at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spectral_ds.geometry.buckets import SHIPMENT_ELEMENTS, columns_at_once
from spectral_ds.laplacian import Exchange
from spectral_ds.laplacian.packing import Packable, nodes_in_scratch, packs_of, shipments_of
from spectral_ds.laplacian.transpose import column_slices
from spectral_ds.planning.flows import FLOAT, Cluster, Floats, Flow
from spectral_ds.planning.groups import PlannedGroup
from spectral_ds.planning.parts import Parts, joined


@dataclass(frozen=True)
class ScratchElements:
    """Elements that a rank stores at once, the largest of any bucket; (world size,) each.

    Attributes:
        stored: of a signal with boundary rows; there are two.
        own: of one without.
        sent, received: of the buffers of exchanges.
        boundary: of the larger of the two buffers of boundary exchanges.
    """

    stored: Floats
    own: Floats
    sent: Floats
    received: Floats
    boundary: Floats

    @classmethod
    def none(cls, cluster: Cluster) -> "ScratchElements":
        zeros = np.zeros(cluster.world_size)
        return cls(zeros, zeros, zeros, zeros, zeros)

    @classmethod
    def passing(cls, flow: Flow) -> "ScratchElements":
        """Of buffers that what travels passes through."""
        zeros = np.zeros_like(flow.sent)
        return cls(zeros, zeros, flow.sent, flow.received, zeros)

    def __or__(self, other: "ScratchElements") -> "ScratchElements":
        return ScratchElements(
            np.maximum(self.stored, other.stored),
            np.maximum(self.own, other.own),
            np.maximum(self.sent, other.sent),
            np.maximum(self.received, other.received),
            np.maximum(self.boundary, other.boundary),
        )

    def bytes_of(self, exchange_bytes: int) -> Floats:
        """Bytes of float32, and of elements that travel; boundary rows are cast in between."""
        staging = self.boundary if exchange_bytes != FLOAT else 0
        passing = exchange_bytes * (self.sent + self.received)
        return FLOAT * (2 * self.stored + self.own + staging) + passing


@dataclass(frozen=True, eq=False)
class Pack:
    """Groups of equal width and exchange; (world size,) where it says by rank.

    Attributes:
        exchange: how their rows come to their neighbours.
        groups: which.
        is_dense: whether products are dense, by the eigenbasis of depth paths.
        slices: of columns, one product each.
        hop: what travels before a product; nothing if it is transposed.
        transposed: of each slice that is: the elements of the rank that owns most of it, and what
            travels to transpose it, and again to come back.
        rows, columns: nodes that a rank multiplies, and columns of them; by rank.
        links: nonzero numbers of its block; by rank.
        scratch: what it takes.
    """

    exchange: Exchange
    groups: tuple[PlannedGroup, ...]
    is_dense: bool
    slices: int
    hop: Flow
    transposed: tuple[tuple[int, Flow], ...]
    rows: Floats
    columns: Floats
    links: Floats
    scratch: ScratchElements

    @property
    def transpose(self) -> Flow:
        """What travels to transpose the pack, and again to come back."""
        flows = (flow for _, flow in self.transposed)
        return sum(flows, Flow.none_like(self.rows))

    @property
    def kernel_bytes(self) -> Floats:
        """Bytes of torch's CSR block (32-bit indices, float32), or of a dense one and its basis."""
        if self.is_dense:
            # Block and function in float32, eigenvectors in float64.
            return self.rows * self.rows * (4 + 4 + 8) * (self.columns > 0)
        return (8 * self.links + 4 * (self.rows + 1)) * (self.rows > 0)


def packed(
    groups: Sequence[PlannedGroup],
    exchanges: Sequence[Exchange],
    cluster: Cluster,
    bucket_elements: int,
) -> list[Pack]:
    """The packs of a graph's groups, see `packs_of`."""
    packables = [
        Packable(group.parts.width, group.elements, group.is_path, exchange)
        for group, exchange in zip(groups, exchanges, strict=True)
    ]
    return [
        _pack(exchanges[pack[0]], [groups[position] for position in pack], cluster, bucket_elements)
        for pack in packs_of(packables, bucket_elements)
    ]


def shipped(packs: Sequence[Pack], cluster: Cluster) -> list[Flow]:
    """What travels of the slices that are transposed together, see `shipments_of`."""
    slices = [each for pack in packs for each in pack.transposed]
    together = shipments_of([elements for elements, _ in slices], SHIPMENT_ELEMENTS)
    return [
        sum((slices[position][1] for position in positions), Flow.none(cluster))
        for positions in together
    ]


def _pack(
    exchange: Exchange, groups: Sequence[PlannedGroup], cluster: Cluster, bucket_elements: int
) -> Pack:
    parts = joined([group.parts for group in groups])
    is_dense = groups[0].is_path and exchange != "boundary"
    if exchange == "transpose":
        return _transposed(groups, parts, is_dense, cluster, bucket_elements)
    rows = cluster.by_rank(parts.rank, parts.touched)
    columns = parts.columns(cluster).astype(np.float64)
    boundary = sum((group.boundary.rows for group in groups), np.zeros(cluster.world_size))
    hop = sum((group.boundary.hop for group in groups), Flow.none(cluster))
    if is_dense:  # each rank slices what it owns
        at_once = columns_at_once(bucket_elements, parts.all_nodes)
        slices = -(-int(columns.max()) // at_once)
    else:
        most = int(nodes_in_scratch(rows, boundary).max())
        at_once = columns_at_once(bucket_elements, most)
        slices = -(-parts.width // at_once)
    here, share = np.minimum(columns, at_once), min(1.0, at_once / parts.width)
    links = sum((group.links for group in groups), np.zeros(cluster.world_size)) + rows
    sent, received = hop.sent * share, hop.received * share
    scratch = ScratchElements(
        (rows + boundary) * here, rows * here, sent, received, np.maximum(sent, received)
    )
    return Pack(exchange, tuple(groups), is_dense, slices, hop, (), rows, columns, links, scratch)


def _transposed(
    groups: Sequence[PlannedGroup],
    parts: Parts,
    is_dense: bool,
    cluster: Cluster,
    bucket_elements: int,
) -> Pack:
    """A pack whose slices of columns are divided among the ranks by what they own of them."""
    touched = cluster.by_rank(parts.rank, parts.touched)
    at_once = columns_at_once(bucket_elements, int(touched.max()))
    transposed: list[tuple[int, Flow]] = []
    scratch = ScratchElements.none(cluster)
    columns = zeros = np.zeros(cluster.world_size)
    for low in range(0, parts.width, at_once):
        high = min(low + at_once, parts.width)
        elements = cluster.by_rank(parts.rank, parts.count(low, high)).astype(np.int64)
        slices = low + np.array(column_slices(elements, high - low))
        own = np.diff(slices).astype(np.float64)
        stored = parts.all_nodes * own
        scratch |= ScratchElements(stored, stored, zeros, zeros, zeros)
        flow = parts.transposed(slices, cluster)
        transposed.append((int(elements.max()), flow))
        columns = columns + own
    has_any = (columns > 0).astype(np.float64)
    return Pack(
        "transpose",
        tuple(groups),
        is_dense,
        len(transposed),
        Flow.none(cluster),
        tuple(transposed),
        parts.all_nodes * has_any,
        columns,
        (sum(group.all_links for group in groups) + parts.all_nodes) * has_any,
        scratch,
    )
