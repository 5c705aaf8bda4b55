"""Whether ranks have the same graph: of each edge both directions, and of replicas all edges."""

import numpy as np
import torch

from spectral_ds.graph import Edges
from spectral_ds.laplacian.parameter_graph import ParameterGraph
from spectral_ds.sharding import Communicator

# Odd constants of splitmix64 (Steele, Lea, Flood 2014).
_FIRST, _SECOND, _LAST = (
    np.uint64(each) for each in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


class GraphsDifferError(RuntimeError):
    """Ranks that should have one graph have several."""


def require_one_graph(graph: ParameterGraph, ranks: Communicator, everyone: Communicator) -> None:
    """Raise GraphsDifferError on all ranks unless they have the same graph (collective).

    Args:
        graph: this rank's part; depth paths, which follow from names and shapes, are left out.
        ranks: those that share the parameters.
        everyone: all ranks that train together, replicas included.
    """
    edges = graph.primary_edges()
    own = np.array([_checksum(edges), _checksum(edges.reversed())]).view(np.int64)
    there, back = ranks.sum_(torch.from_numpy(own).to(ranks.device)).tolist()
    is_whole = there == back
    # Halves, which float64 holds exactly.
    halves = [there >> 32, there & 0xFFFFFFFF]
    known = torch.tensor(
        [*halves, *(-each for each in halves), not is_whole],
        dtype=torch.float64,
        device=everyone.device,
    )
    found = everyone.maximum_(known).tolist()
    if found[4]:
        raise GraphsDifferError(
            "spectral_ds.graph: the two directions of edges between ranks have other weights: a "
            "rank computes otherwise than the others (other libraries, or a fault of its machine)"
        )
    if found[:2] != [-each for each in found[2:4]]:
        raise GraphsDifferError(
            "spectral_ds.graph: replicas have made different graphs: they do not hold the same "
            "weights, or a rank computes otherwise than the others"
        )


def _checksum(edges: Edges) -> np.uint64:
    """Σ of a hash of each edge modulo 2^64: the same in any order and any division."""
    mixed = edges.source.astype(np.uint64) * _FIRST
    mixed += edges.target.astype(np.uint64) * _SECOND
    mixed ^= edges.weight.view(np.uint64)
    mixed ^= mixed >> np.uint64(31)
    mixed *= _LAST
    mixed ^= mixed >> np.uint64(29)
    return np.uint64(mixed.sum(dtype=np.uint64))
