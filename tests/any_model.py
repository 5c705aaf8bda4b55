"""Any parameters, any edges and any cut of the parameters among ranks, and the truth about them.

The truth is by brute force or by the oracle.
"""

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import oracle
import torch
from hypothesis import settings
from hypothesis import strategies as st

from spectral_ds.filters import FixedTransfer, GraphFilter
from spectral_ds.graph import Depth, ParameterNodes, Ring, Similarity
from spectral_ds.laplacian import ParameterGraph, Work, plan_operators
from spectral_ds.sharding import Communicator, Fragment, ShardLayout
from spectral_ds.sketches import WeightFeatures

CPU = torch.device("cpu")
ALONE = Communicator.alone(CPU)

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)

FACTORS = st.sampled_from([1.0, 0.5, 3.0])
DEPTH, RING = st.builds(Depth, FACTORS), st.builds(Ring, FACTORS)
SIMILARITY = st.builds(
    Similarity,
    neighbours=st.integers(1, 3),
    scope=st.sampled_from(["parameter", "role"]),
    sketch_width=st.sampled_from([0, 2]),
    weight=FACTORS,
)
SEEDS = st.integers(0, 2**32)


class Model(NamedTuple):
    """Parameters with weights, and what makes a graph of them."""

    parameters: list[ParameterNodes]
    weights: dict[str, np.ndarray]
    families: list
    normalized: bool

    @property
    def kind(self):
        return self.parameters[0].kind

    @property
    def layout(self):
        """All on one rank."""
        return ShardLayout((tuple(Fragment(p.name, 0, p.numel) for p in self.parameters),), 0)

    def graph(self):
        weights = WeightFeatures(self.layout.own, flattened(self.weights), 0, ALONE)
        return ParameterGraph.build(
            self.parameters,
            self.families,
            self.layout,
            {"weights": weights},
            ALONE,
            normalized=self.normalized,
            progress=lambda done: None,
        )

    def plan(self, graph, bucket_elements=10**6, dtype=torch.float64):
        return plan_operators(
            graph,
            self.layout,
            ALONE,
            ALONE,
            work=Work(hops=1, transposes=2),
            exchange="best",
            kernel="torch_csr",
            bucket_elements=bucket_elements,
            dtype=dtype,
        )

    def times_laplacian(self, signal, bucket_elements=10**6):
        """L x by the operators of a plan; signals by name."""
        graph = self.graph()
        x = [each.clone() for each in flattened(signal)]
        for shipment in self.plan(graph, bucket_elements).shipments:
            for operator in shipment.carry(x):
                scratch = operator.scratch
                operator.apply(scratch.x, scratch.out)
                scratch.out.values.add_(scratch.x.values).mul_(graph.lambda_max / 2)
        return shaped(x, signal)

    def filtered(self, signal, response, strength=1.0):
        """(1 − s) x + s h(L) x by the package, in float32."""
        graph = self.graph()
        plan = self.plan(graph, dtype=torch.float32)
        transfer = FixedTransfer(response, graph.lambda_max, graph.only_paths, "best", 1e-6, CPU)
        x = [each.float() for each in flattened(signal)]
        GraphFilter(plan.shipments, transfer).apply(x, strength)
        return shaped(x, signal)

    def dense_laplacian(self):
        """L by the oracle."""
        edges = []
        for family in self.families:
            edge = {"family": type(family).__name__.lower(), "weight": family.weight}
            if isinstance(family, Similarity):
                for key in ("neighbours", "scope", "sketch_width"):
                    edge[key] = getattr(family, key)
            edges.append(edge)
        adjacency = oracle.adjacency_of(self.weights, edges, kind=self.kind)
        return oracle.laplacian_of(adjacency, "normalized" if self.normalized else "combinatorial")


def flattened(signal):
    return [torch.from_numpy(np.array(each, np.float64)).reshape(-1) for each in signal.values()]


def shaped(tensors, signal):
    pairs = zip(signal.items(), tensors, strict=True)
    return {name: tensor.double().numpy().reshape(each.shape) for (name, each), tensor in pairs}


@st.composite
def models(draw):
    """Up to six parameters of at most three shapes, in up to five blocks and three roles.

    Similarity leaves elements alone: one number has no direction.
    """
    kind = draw(st.sampled_from(["row", "column", "element"]))
    families = [DEPTH, RING] if kind == "element" else [DEPTH, RING, SIMILARITY]
    dimensions = st.lists(st.integers(1, 6), max_size=3)
    shapes = draw(st.lists(dimensions.map(tuple), min_size=1, max_size=3))
    place = st.tuples(st.integers(0, 4), st.sampled_from("abc"))
    places = draw(st.lists(place, min_size=1, max_size=6, unique=True))
    parameters = [
        ParameterNodes(f"layers.{block}.{role}", draw(st.sampled_from(shapes)), kind)
        for block, role in places
    ]
    generator = np.random.default_rng(draw(SEEDS))
    return Model(
        parameters,
        {p.name: generator.standard_normal(p.shape) for p in parameters},
        draw(st.lists(st.one_of(families), min_size=1, max_size=3)),
        draw(st.booleans()),
    )


@st.composite
def cut(draw, model):
    """The model's parameters in pieces, each on some rank out of at most four.

    Pieces may be empty, and some rank may have nothing but a parameter that no graph knows.
    """
    world_size = draw(st.integers(1, 4))
    fragments = [[Fragment("another parameter", 0, 7)] for _ in range(world_size)]
    for parameter in draw(st.permutations(model.parameters)):
        cuts = draw(st.lists(st.integers(0, parameter.numel), max_size=3))
        bounds = [0, *sorted(cuts), parameter.numel]
        for start, end in pairwise(bounds):
            rank = draw(st.integers(0, world_size - 1))
            fragments[rank].append(Fragment(parameter.name, start, end - start))
    return ShardLayout(tuple(map(tuple, fragments)), 0)


@st.composite
def groups_cut(draw):
    """A group of joined parameters, the fragments of all ranks, and a slice of its columns."""
    model = draw(models())
    layout = draw(cut(model))
    group = draw(st.sampled_from(model.graph().groups))
    width = group.bucket.width
    low = draw(st.integers(0, width - 1))
    high = draw(st.integers(low + 1, width))
    return group, layout.fragments, replace(group.bucket, low=low, high=high)


def flat_indices(parameter):
    """The flat index of every element, (nodes, width)."""
    flat = np.arange(parameter.numel).reshape(parameter.shape)
    if parameter.kind == "parameter":
        return flat.reshape(1, -1)
    return oracle.as_nodes(flat, parameter.kind).astype(int)


def ranks_of(bucket, fragments):
    """The rank that owns each element of a bucket, (nodes, width), by brute force."""
    found = []
    for parameter in bucket.parameters:
        rank = np.full(parameter.numel, -1)
        for number, own in enumerate(fragments):
            for fragment in own:
                if fragment.parameter == parameter.name:
                    rank[fragment.start : fragment.end] = number
        found.append(rank[flat_indices(parameter)])
    return np.concatenate(found)[:, bucket.low : bucket.high]


def numbered(bucket, own):
    """A rank's fragments, each element holding its number in the bucket's parameters, from 1."""
    first, total = {}, 1
    for parameter in bucket.parameters:
        first[parameter.name] = total
        total += parameter.numel
    return [
        torch.arange(f.start, f.end, dtype=torch.float64) + first.get(f.parameter, -1e6)
        for f in own
    ]


def numbers_of(bucket):
    """The same numbers, (nodes, width)."""
    parts, total = [], 1
    for parameter in bucket.parameters:
        parts.append(flat_indices(parameter) + total)
        total += parameter.numel
    return np.concatenate(parts)[:, bucket.low : bucket.high]
