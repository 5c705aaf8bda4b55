"""The adjacency of a bucket, row-sharded: each rank holds all edges of the rows it owns a part of.

Every row has one primary rank, the owner of its first element, which finds the row's neighbours.
The edges then go to every owner of either end, so that both ends of an edge know it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.geometry.buckets import Bucket
from spectral_ds.geometry.owners import RowOwners
from spectral_ds.graph import EdgeFamily, Edges, Similarity
from spectral_ds.graph.similarity import COSINE_STEPS, gaussian_weight, nearest_in_parts
from spectral_ds.sharding import Communicator
from spectral_ds.sketches import FeatureSource


def build_adjacency(
    bucket: Bucket,
    families: Sequence[EdgeFamily],
    owners: RowOwners,
    features: Mapping[str, FeatureSource],
    communicator: Communicator,
) -> Edges:
    """W = Σ_f weight_f · W_f, the rows that this rank owns a part of (collective).

    Args:
        features: by name, where similarity finds the features it compares.

    Returns:
        Undirected edges, both directions where this rank owns both ends, sorted by source and
        target; sources are rows of this rank.
    """
    rows = np.arange(bucket.nodes)
    primary = rows[owners.primary(rows) == communicator.rank]
    parts = []
    for family in families:
        if isinstance(family, Similarity):
            directed = _similarity_edges(
                bucket, family, primary, features[family.features], communicator
            )
        else:
            directed = family.edges(bucket.parameters, bucket.first_node, primary)
        edges = _deliver(directed, owners, communicator).combined(np.maximum)
        parts.append(Edges(edges.source, edges.target, family.weight * edges.weight))
    return Edges.concatenate(parts).combined(np.add)


def _similarity_edges(
    bucket: Bucket,
    family: Similarity,
    primary: npt.NDArray[np.int64],
    source: FeatureSource,
    communicator: Communicator,
) -> Edges:
    """Directed edges from this rank's primary rows to their nearest nodes, scope by scope."""
    parts = []
    for scope in family.scopes(bucket.parameters):
        parameters = [bucket.parameters[position] for position in scope]
        nodes = np.concatenate(
            [np.arange(*bucket.first_node[position : position + 2]) for position in scope]
        )
        compared = family.parts(parameters)
        features = source(parameters, family.sketch_width) if len(nodes) > compared else None
        if features is None:
            continue
        own = torch.from_numpy(np.flatnonzero(np.isin(nodes, primary))).to(features.device)
        steps = COSINE_STEPS[family.features]
        origin, target, distance = nearest_in_parts(
            features, own, family.neighbours, steps, compared
        )
        total = torch.stack((distance.sum(), distance.new_tensor(float(distance.numel()))))
        distance_sum, pairs = communicator.sum_(total).tolist()
        weight = gaussian_weight(distance, distance_sum / max(pairs, 1.0))
        # A weight that underflows to zero is no edge.
        kept = weight > 0
        parts.append(
            Edges(
                nodes[origin[kept].cpu().numpy()],
                nodes[target[kept].cpu().numpy()],
                weight[kept].cpu().numpy(),
            )
        )
    return Edges.concatenate(parts)


def _deliver(directed: Edges, owners: RowOwners, communicator: Communicator) -> Edges:
    """Send each edge, in both directions, to every rank that owns a part of its source."""
    both = Edges.concatenate([directed, directed.reversed()])
    position, rank = owners.all_of(both.source)
    bits = both.weight.astype(np.float64).view(np.int64)
    rows = np.stack((both.source, both.target, bits), axis=1)[position]
    source, target, bits = communicator.exchange_rows(rows, rank)[0].T.copy()
    return Edges(source, target, bits.view(np.float64))


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
