"""One graph of the configuration: how it is exchanged, what it sends, stores and computes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spectral_ds.config import SpectralConfig
from spectral_ds.geometry.buckets import below_shard
from spectral_ds.graph import EdgeFamily, ParameterNodes, Similarity
from spectral_ds.laplacian import Exchange, Work
from spectral_ds.laplacian.packing import count_exchanges
from spectral_ds.planning.chance import reached
from spectral_ds.planning.costs import Cost, function_cost
from spectral_ds.planning.flows import FLOAT, Cluster, Floats, Flow
from spectral_ds.planning.groups import PlannedGroup, plan_groups
from spectral_ds.planning.layouts import Cuts
from spectral_ds.planning.packs import Pack, ScratchElements, packed, shipped
from spectral_ds.planning.parts import Parts
from spectral_ds.sketches import sketch_size
from spectral_ds.stack.choices import GraphChoice, feature_width, sketch_shape
from spectral_ds.stack.responses import Transfers, check_exchanges, choose_transfers, works_of

# An edge: two node numbers and a weight, 64 bits each.
EDGE_BYTES = 24
# A run in `RowOwners`: start, end and rank, 64 bits each.
RUN_BYTES = 24


@dataclass(frozen=True, eq=False)
class PlannedGraph:
    """One graph, and what a step takes of each rank; (world size,) where it says by rank.

    Attributes:
        lambda_max: the bound of its eigenvalues; of similarity, combinatorial, an estimate.
        transfers: what acts on it, before the first sample of the gradient.
        exchange_bytes: of an element that travels.
        work: what a step takes where filter and regularizer act.
        groups, exchanges: sets of joined parameters, and how each is exchanged.
        packs: what the filter works on.
        nodes: of which a rank owns a part; by rank.
        edges_held: directed edges from them, about; by rank.
        memory: bytes by what for; by rank.
        filter, penalty: what they cost at a step where they act; None if they never do.
    """

    lambda_max: float
    transfers: Transfers
    exchange_bytes: int
    work: Work
    groups: tuple[PlannedGroup, ...]
    exchanges: tuple[Exchange, ...]
    packs: tuple[Pack, ...]
    nodes: Floats
    edges_held: Floats
    memory: dict[str, Floats]
    filter: Cost | None
    penalty: Cost | None

    @property
    def parameters(self) -> list[ParameterNodes]:
        """All that it covers."""
        return [parameter for group in self.groups for parameter in group.parameters]

    @property
    def hop(self) -> Flow:
        """Bytes that travel before a product with L."""
        elements = sum((pack.hop for pack in self.packs), Flow.none_like(self.nodes))
        return elements * self.exchange_bytes

    @property
    def transpose(self) -> Flow:
        """Bytes that travel to transpose what is transposed, or to return it."""
        elements = sum((pack.transpose for pack in self.packs), Flow.none_like(self.nodes))
        return elements * self.exchange_bytes

    @property
    def bytes_per_hop(self) -> int:
        """Bytes that all ranks send for a product with L."""
        return self.hop.total

    @property
    def bytes_per_transpose(self) -> int:
        """Bytes that all ranks send to transpose what is transposed, or to return it."""
        return self.transpose.total

    @property
    def all_nodes(self) -> int:
        return sum(p.nodes for group in self.groups for p in group.parameters)

    @property
    def edges(self) -> tuple[float, float, float]:
        """Undirected edges: expected, and the least and the most possible."""
        expected, least, most = np.sum([group.edges for group in self.groups], axis=0).tolist()
        return expected, least, most

    @property
    def exchanges_counted(self) -> dict[Exchange, int]:
        """How many groups are exchanged in each way."""
        return count_exchanges(self.exchanges)


def plan_graph(
    choice: GraphChoice,
    config: SpectralConfig,
    cuts: Mapping[str, Cuts],
    cluster: Cluster,
    bucket_elements: int,
    is_first: bool = True,
) -> PlannedGraph:
    """What one graph takes of each rank.

    Args:
        choice: what it is made of.
        bucket_elements: no rank stores more of one bucket, unless a single column is larger.
        is_first: of several stacked graphs; the monitor measures that one.

    Raises:
        SpectralConfigError: the response cannot be evaluated on it.
    """
    parameters, settings = choice.parameters, choice.settings
    groups = plan_groups(parameters, choice.families, cuts, cluster)
    max_degree = max(group.max_degree for group in groups)
    lambda_max = 2.0 if settings.laplacian == "normalized" else 2 * max_degree or 1.0
    only_paths = all(group.is_path for group in groups)
    transfers = choose_transfers(config, lambda_max, only_paths, torch.device("cpu"))
    works = works_of(transfers, config)
    exchange_bytes = getattr(torch, config.operator.exchange_dtype).itemsize
    exchanges = [group.exchange(works.total, config.operator.exchange) for group in groups]
    check_exchanges(works, exchanges, config)
    elements = sum(parameter.numel for parameter in parameters)
    at_once = below_shard(bucket_elements, elements, cluster.world_size)
    packs = packed(groups, exchanges, cluster, at_once)
    own = {p.name: Parts.of([p], [cuts[p.name]]) for p in parameters}
    nodes, edges_held = _held(groups, own, cluster)
    scratch = ScratchElements.none(cluster)
    for pack in packs:
        scratch |= pack.scratch
    shipments = shipped(packs, cluster)
    for flow in shipments:
        scratch |= ScratchElements.passing(flow)

    def cost_of(work: Work) -> Cost | None:
        if work.transposes == 0:
            return None
        return function_cost(packs, work, len(shipments), exchange_bytes, cluster)

    memory = {
        "edges": sum((_edge_bytes(group) for group in groups), np.zeros(cluster.world_size)),
        "kernels": sum((pack.kernel_bytes for pack in packs), np.zeros(cluster.world_size)),
        "scratch": scratch.bytes_of(exchange_bytes),
        "statistics": _statistics(groups, own, choice, config, cluster, bucket_elements, is_first),
    }
    return PlannedGraph(
        lambda_max,
        transfers,
        exchange_bytes,
        works.total,
        tuple(groups),
        tuple(exchanges),
        tuple(packs),
        nodes,
        edges_held,
        memory,
        cost_of(works.filter),
        cost_of(works.penalty),
    )


def _held(
    groups: Sequence[PlannedGroup], own: Mapping[str, Parts], cluster: Cluster
) -> tuple[Floats, Floats]:
    """Nodes of which each rank owns a part, and directed edges from them."""
    nodes, edges = np.zeros(cluster.world_size), np.zeros(cluster.world_size)
    for group in groups:
        runs = [own[parameter.name] for parameter in group.parameters]
        held = sum((cluster.by_rank(r.rank, r.touched) for r in runs), np.zeros_like(nodes))
        nodes += held
        edges += held * 2 * group.edges[0] / sum(r.all_nodes for r in runs)
    return nodes, edges


def _edge_bytes(group: PlannedGroup) -> Floats:
    """Edges, degrees and owners, as a group holds them on each rank."""
    edges = np.full_like(group.links, group.all_links) if group.is_path else group.links
    fixed = 8 * group.parts.all_nodes + RUN_BYTES * len(group.parts.rank)
    return EDGE_BYTES * edges + fixed


def _statistics(
    groups: Sequence[PlannedGroup],
    own: Mapping[str, Parts],
    choice: GraphChoice,
    config: SpectralConfig,
    cluster: Cluster,
    bucket_elements: int,
    is_first: bool,
) -> Floats:
    """Sketches of each node that a rank owns a part of, and what measures them, about.

    The running mean and the sample, for the monitor also the sample before; where gradients are
    compared, a mean and a sample of other sketches.
    """
    zeros = np.zeros(cluster.world_size)
    shape = sketch_shape(choice.settings, config)
    if shape is None:
        return zeros
    kept = {shape: 3 if config.monitor.enabled and is_first else 2}
    compared = feature_width(choice.settings)
    if compared is not None:
        kept[compared, 0] = kept.get((compared, 0), 0) + 2
    partial, links = zeros, zeros
    # What is worked on together: groups of sketches of equal length, each group of paths alone.
    signals: dict[int, tuple[Floats, Floats]] = {}
    for index, group in enumerate(groups):
        columns = sketch_size(group.parameters[0].width, *shape)
        for parameter in group.parameters:
            parts = own[parameter.name]
            values = sum(n * sketch_size(parameter.width, *each) for each, n in kept.items())
            partial = partial + values * cluster.by_rank(parts.rank, parts.touched)
        all_nodes = sum(parameter.nodes for parameter in group.parameters)
        nodes = all_nodes * group.elements / group.parts.numel
        boundary = columns * _boundary_nodes(group, choice.families, nodes, all_nodes)
        key = -1 - index if group.is_path else columns
        held, needed_there = signals.get(key, (zeros, zeros))
        signals[key] = held + columns * nodes, needed_there + boundary
        links = links + nodes * (group.all_links / group.parts.all_nodes + 1)
    scratch = zeros
    for own_elements, boundary in signals.values():
        share = np.minimum(1, bucket_elements / np.maximum(own_elements, 1))
        scratch = np.maximum(scratch, (3 * own_elements + 4 * boundary) * share)
    wide = {p.width for group in groups for p in group.parameters}
    sizes = [(w, sketch_size(w, *each)) for w in wide for each in kept]
    projections = sum(columns * w for w, columns in sizes if columns < w)
    return FLOAT * (partial + scratch + projections) + 8 * links


def _boundary_nodes(
    group: PlannedGroup, families: Sequence[EdgeFamily], nodes: Floats, all_nodes: int
) -> Floats:
    """Nodes of others that a rank needs when each node has one rank."""
    similar = [family for family in families if isinstance(family, Similarity)]
    if similar and group.parts.by_column.any():
        scopes = sum(
            similar[0].parts([group.parameters[position] for position in scope])
            for scope in similar[0].scopes(group.parameters)
        )
        mine = (nodes / scopes).round().astype(np.int64)
        others = all_nodes // scopes - mine
        return scopes * others * reached(mine, all_nodes // scopes, similar[0].neighbours)
    return group.boundary.hop.received / group.parameters[0].width
