"""Groups of joined parameters: their size, their boundary, and how they are exchanged.

In: names, shapes, edge families and cuts. Out: a `PlannedGroup` for each set of parameters that no
edge leaves. Blocks repeat: what is cut and joined alike is worked out once.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from spectral_ds.geometry.buckets import linked_parameters
from spectral_ds.graph import Depth, EdgeFamily, ParameterNodes, Similarity
from spectral_ds.laplacian import Exchange, ExchangeName, Work
from spectral_ds.laplacian.packing import exchange_of
from spectral_ds.laplacian.transpose import column_slices
from spectral_ds.planning.chance import USUAL_WEIGHT, expected, most_neighbours
from spectral_ds.planning.flows import Cluster, Floats, Flow
from spectral_ds.planning.layouts import Cuts, Ints
from spectral_ds.planning.parts import Parts
from spectral_ds.planning.structure import Boundary, known_boundary, node_degrees, shifts


@dataclass(frozen=True, eq=False)
class PlannedGroup:
    """Parameters that edges join.

    Attributes:
        parameters: as the graph's user sees them.
        parts: who owns what, in the coordinates of the group's bucket.
        is_path: whether it is a group of depth paths, where each parameter is one node.
        boundary: what ranks need of each other, a hop.
        elements: that each rank owns; (world size,).
        transpose: what a transposition of the whole group sends, one way.
        edges: undirected, of the graph's nodes: expected, and the least and the most possible.
        all_links: directed edges of the bucket.
        links: of them, those from nodes that each rank owns a part of; (world size,).
        max_degree: the largest sum of a node's weights, about.
    """

    parameters: tuple[ParameterNodes, ...]
    parts: Parts
    is_path: bool
    boundary: Boundary
    elements: Ints
    transpose: Flow
    edges: tuple[float, float, float]
    all_links: float
    links: Floats
    max_degree: float

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(parameter.role for parameter in self.parameters))

    def exchange(self, work: Work, wanted: ExchangeName) -> Exchange:
        """How its nodes come to their neighbours, see `exchange_of`."""
        return exchange_of(self.boundary.hop.total, self.transpose.total, work, wanted)


def plan_groups(
    parameters: Sequence[ParameterNodes],
    families: Sequence[EdgeFamily],
    cuts: Mapping[str, Cuts],
    cluster: Cluster,
) -> list[PlannedGroup]:
    """All groups, in model order."""
    known: dict[Hashable, PlannedGroup] = {}
    found = []
    for joined in linked_parameters(parameters, families):
        links = tuple(tuple(family.links(joined)) for family in families)
        key = tuple((p.shape, p.storage, p.kind, cuts[p.name]) for p in joined), links
        if key not in known:
            known[key] = _planned(joined, families, [cuts[p.name] for p in joined], cluster)
        found.append(replace(known[key], parameters=joined))
    return found


def _planned(
    parameters: tuple[ParameterNodes, ...],
    families: Sequence[EdgeFamily],
    cuts: Sequence[Cuts],
    cluster: Cluster,
) -> PlannedGroup:
    is_path = all(isinstance(family, Depth) for family in families)
    members = parameters
    if is_path:
        members = tuple(replace(parameter, kind="parameter") for parameter in parameters)
    parts = Parts.of(members, cuts)
    boundary, share = Boundary.none(cluster), np.zeros(cluster.world_size)
    count, degree = node_degrees(members, families)
    max_degree = float(degree.max())
    nodes = np.array([parameter.nodes for parameter in parameters])
    edges = np.full(3, float(count @ nodes) / 2)
    for family in families:
        if isinstance(family, Similarity):
            # A scope of one parameter may be a stack of matrices.
            apart = [family.parts([parameter]) for parameter in parameters]
            max_degree += (
                family.weight
                * USUAL_WEIGHT
                * max(
                    most_neighbours(sum(nodes[scope]) // apart[scope[0]], family.neighbours)
                    for scope in family.scopes(parameters)
                )
            )
            for scope in family.scopes(parameters):
                inside = parts.only(scope)
                compared = inside.each_matrix() if apart[scope[0]] > 1 else [inside]
                for each in compared:
                    chance = expected(each, family, cluster)
                    boundary += chance.boundary
                    share = np.maximum(share, chance.share)
                    edges += chance.edges
                count[scope] += chance.degree
    boundary += known_boundary(members, cuts, shifts(members, families, cuts), cluster, 1 - share)
    elements = parts.elements(cluster)
    slices = np.array(column_slices(elements, parts.width))
    of_run = count[parts.parameter] * parts.touched
    return PlannedGroup(
        parameters,
        parts,
        is_path,
        boundary,
        elements,
        parts.transposed(slices, cluster),
        (float(edges[0]), float(edges[1]), float(edges[2])),
        float(count @ np.array([member.nodes for member in members])),
        cluster.by_rank(parts.rank, of_run),
        max_degree,
    )
