"""The adjacency of a bucket, row-sharded: each rank holds all edges of the rows it owns a part of.

Every row has one primary rank, the owner of its first element, which finds the row's neighbours.
The edges then go to every owner of either end, so that both ends of an edge know it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.graph import Depth, EdgeFamily, Edges
from spectral_ds.graph.similarity import Similarity, gaussian_weight, nearest
from spectral_ds.laplacian.buckets import Bucket
from spectral_ds.laplacian.features import gather_features
from spectral_ds.sharding import Communicator, ShardLayout, intervals


@dataclass(frozen=True)
class RowOwners:
    """Which ranks own a part of which row of a bucket.

    Attributes:
        start, end, rank: the owned intervals of all ranks, sorted by address; (intervals,).
    """

    bucket: Bucket
    start: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]

    @classmethod
    def of(cls, bucket: Bucket, layout: ShardLayout) -> "RowOwners":
        owned = [bucket.owned(fragments) for fragments in layout.fragments]
        runs = np.concatenate(owned)
        rank = np.repeat(np.arange(len(owned)), [len(runs) for runs in owned])
        order = np.argsort(runs[:, 0], kind="stable")
        return cls(bucket, runs[order, 0], runs[order, 1], rank[order])

    def sampled(self, stride: int) -> "RowOwners":
        """The owners of every stride-th address, by address divided by the stride."""
        start, end = -(-self.start // stride), -(-self.end // stride)
        kept = end > start
        return RowOwners(self.bucket, start[kept], end[kept], self.rank[kept])

    def of_address(self, address: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rank that owns each address."""
        return self.rank[np.searchsorted(self.start, address, side="right") - 1]

    def primary(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rank that owns the first element of each row."""
        return self.of_address(rows * self.bucket.width)

    def all_of(
        self, rows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(position in rows, rank) for every rank that owns a part of each row."""
        width = self.bucket.width
        first = np.searchsorted(self.end, rows * width, side="right")
        last = np.searchsorted(self.start, (rows + 1) * width, side="left")
        position = np.repeat(np.arange(len(rows)), last - first)
        interval = intervals.members(np.stack((first, last), axis=1))
        ranks = int(self.rank.max()) + 1
        pairs = np.unique(position * ranks + self.rank[interval])
        return pairs // ranks, pairs % ranks


def build_adjacency(
    bucket: Bucket,
    families: Sequence[EdgeFamily],
    layout: ShardLayout,
    owners: RowOwners,
    weights: Sequence[torch.Tensor],
    seed: int,
    communicator: Communicator,
) -> Edges:
    """W = Σ_f weight_f · W_f, the rows that this rank owns a part of (collective).

    Args:
        weights: this rank's reference weights, flat, in the order of `layout.own`.
        seed: of the random projections.

    Returns:
        Undirected edges, both directions where this rank owns both ends, sorted by source and
        target; sources are rows of this rank.
    """
    rows = np.arange(bucket.nodes)
    primary = rows[owners.primary(rows) == layout.rank]
    parts = []
    for family in families:
        if isinstance(family, Depth):
            directed = family.edges(bucket.parameters, bucket.first_node, primary)
        else:
            directed = _similarity_edges(
                bucket, family, layout, primary, weights, seed, communicator
            )
        edges = _deliver(directed, owners, communicator).combined(np.maximum)
        parts.append(Edges(edges.source, edges.target, family.weight * edges.weight))
    return Edges.concatenate(parts).combined(np.add)


def _similarity_edges(
    bucket: Bucket,
    family: Similarity,
    layout: ShardLayout,
    primary: npt.NDArray[np.int64],
    weights: Sequence[torch.Tensor],
    seed: int,
    communicator: Communicator,
) -> Edges:
    """Directed edges from this rank's primary rows to their nearest nodes, scope by scope."""
    projection = family.projection(bucket.width, seed)
    parts = []
    for scope in family.scopes(bucket.parameters):
        parameters = [bucket.parameters[position] for position in scope]
        nodes = np.concatenate(
            [np.arange(*bucket.first_node[position : position + 2]) for position in scope]
        )
        if len(nodes) < 2:
            continue
        features = gather_features(parameters, layout.own, weights, projection, communicator)
        own = torch.from_numpy(np.flatnonzero(np.isin(nodes, primary))).to(features.device)
        source, target, distance = nearest(features, own, family.neighbours)
        total = torch.stack((distance.sum(), distance.new_tensor(float(distance.numel()))))
        distance_sum, pairs = communicator.sum_(total).tolist()
        weight = gaussian_weight(distance, distance_sum / max(pairs, 1.0))
        # A weight that underflows to zero is no edge.
        kept = weight > 0
        parts.append(
            Edges(
                nodes[source[kept].cpu().numpy()],
                nodes[target[kept].cpu().numpy()],
                weight[kept].cpu().numpy(),
            )
        )
    return Edges.concatenate(parts)


def _deliver(directed: Edges, owners: RowOwners, communicator: Communicator) -> Edges:
    """Send each edge, in both directions, to every rank that owns a part of its source."""
    both = Edges.concatenate([directed, directed.reversed()])
    position, rank = owners.all_of(both.source)
    ends, _ = communicator.exchange_rows(
        np.stack((both.source, both.target), axis=1)[position], rank
    )
    weight, _ = communicator.exchange_rows(both.weight[position, None], rank)
    return Edges(ends[:, 0], ends[:, 1], weight[:, 0])


def degrees(
    bucket: Bucket, edges: Edges, owners: RowOwners, communicator: Communicator
) -> npt.NDArray[np.float64]:
    """Degree of every node of the bucket, on every rank; (nodes,), one all-reduce."""
    # bincount of nothing gives integers whatever the weights' dtype.
    counted = np.bincount(edges.source, edges.weight, minlength=bucket.nodes)
    degree = counted.astype(np.float64)
    rows = np.arange(bucket.nodes)
    degree[owners.primary(rows) != communicator.rank] = 0
    tensor = torch.from_numpy(degree).to(communicator.device)
    summed: npt.NDArray[np.float64] = communicator.sum_(tensor).cpu().numpy()
    return summed
