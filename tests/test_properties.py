"""What holds for any parameters, any edges and any cut of the parameters among ranks."""

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectral_ds.filters import FixedTransfer, GraphFilter, Heat, Polynomial, Tikhonov, Window
from spectral_ds.geometry.block import LocalBlock
from spectral_ds.geometry.owners import RowOwners
from spectral_ds.graph import Depth, ParameterNodes, Ring, Similarity
from spectral_ds.laplacian import ParameterGraph, Work, plan_operators
from spectral_ds.laplacian.transpose import Transposition, column_slices
from spectral_ds.sharding import Communicator, Fragment, ShardLayout, intervals
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
RESPONSES = st.one_of(
    st.builds(Heat, st.floats(0, 4)),
    st.builds(Tikhonov, st.floats(0, 4)),
    st.builds(Window, st.floats(0, 1)),
    st.just(Polynomial((0.5, -0.25, 0.125))),
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
        operators = self.plan(graph, bucket_elements).operators
        x, y = flattened(signal), [torch.full((p.numel,), torch.nan) for p in self.parameters]
        y = [each.double() for each in y]
        for operator in operators:
            scratch = operator.scratch
            operator.load(x, scratch.x)
            operator.apply(scratch.x, scratch.out)
            scratch.out.values.add_(scratch.x.values).mul_(graph.lambda_max / 2)
            operator.store(scratch.out, y)
        return shaped(y, signal)

    def filtered(self, signal, response, strength=1.0):
        """(1 − s) x + s h(L) x by the package, in float32."""
        graph = self.graph()
        operators = self.plan(graph, dtype=torch.float32).operators
        transfer = FixedTransfer(response, graph.lambda_max, graph.only_paths, "best", 1e-6, CPU)
        x = [each.float() for each in flattened(signal)]
        GraphFilter(operators, transfer).apply(x, strength)
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


def combined(a, x, b, y):
    return {name: a * x[name] + b * y[name] for name in x}


def product(x, y):
    return sum((x[name] * y[name]).sum() for name in x)


def assert_close(x, y, tolerance):
    scale = max(1.0, *(np.abs(each).max() for each in y.values()))
    for name in x:
        np.testing.assert_allclose(x[name], y[name], rtol=0, atol=tolerance * scale)


@st.composite
def models(draw, normalized=None, least=1, families=(DEPTH, RING, SIMILARITY)):
    """Up to six parameters of at most three shapes, in up to five blocks and three roles.

    Args:
        least: length of a dimension; if it is more than 1, there are no vectors.
        families: allowed ones. Similarity leaves elements alone: one number has no direction.
    """
    kinds = ["row", "column"] if set(families) == {SIMILARITY} else ["row", "column", "element"]
    kind = draw(st.sampled_from(kinds))
    if kind == "element":
        families = [family for family in families if family is not SIMILARITY]
    dimensions = st.lists(st.integers(least, 6), min_size=2 if least > 1 else 0, max_size=3)
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
        draw(st.booleans()) if normalized is None else normalized,
    )


def signal_of(model, seed):
    generator = np.random.default_rng(seed)
    return {p.name: generator.standard_normal(p.shape) for p in model.parameters}


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


# Who owns what


@quick
@given(groups_cut())
def test_every_element_has_one_owner_and_every_row_one_primary(drawn):
    _, fragments, bucket = drawn
    expected = ranks_of(bucket, fragments)
    assert expected.min() >= 0
    owners = RowOwners.of(bucket, ShardLayout(fragments, 0))
    found = owners.of_address(np.arange(bucket.numel)).reshape(expected.shape)
    np.testing.assert_array_equal(found, expected)
    counts = [(expected == rank).sum() for rank in range(len(fragments))]
    assert owners.elements(len(fragments)).tolist() == counts

    rows = np.arange(bucket.nodes)
    position, rank = owners.all_of(rows[::-1])
    pairs = list(zip(rows[::-1][position].tolist(), rank.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    assert set(pairs) == {(row, int(r)) for row in rows for r in expected[row]}

    primary, first = owners.primary(rows), 0
    for parameter in bucket.parameters:
        for node in range(parameter.nodes):  # the owner of an element on the diagonal
            column = node * bucket.width // parameter.nodes
            assert primary[first + node] == expected[first + node, column]
        first += parameter.nodes


@quick
@given(groups_cut())
def test_a_local_block_stores_its_own_and_needs_exactly_its_neighbours(drawn):
    group, fragments, bucket = drawn
    rank_of, numbers = ranks_of(bucket, fragments), numbers_of(bucket)
    pairs = list(zip(group.edges.source.tolist(), group.edges.target.tolist(), strict=True))
    for rank, own in enumerate(fragments):
        is_own = rank_of == rank
        own_rows = np.flatnonzero(is_own.any(axis=1))
        edges = group.edges.from_sources(own_rows)
        block = LocalBlock.of(bucket.width, bucket.rectangles(own), edges)
        needed = {
            b * bucket.width + column
            for a, b in pairs
            for column in np.flatnonzero(is_own[a] & ~is_own[b])
        }
        assert set(intervals.members(block.needed).tolist()) == needed
        assert block.own_rows.tolist() == own_rows.tolist()
        boundary = sorted({address // bucket.width for address in needed} - set(own_rows))
        assert block.boundary_rows.tolist() == boundary
        columns = np.flatnonzero(is_own.any(axis=0))
        assert intervals.members(block.columns).tolist() == columns.tolist()

        values = numbered(bucket, own)
        matrix = torch.full((block.stored, block.width), torch.nan, dtype=torch.float64)
        block.load(values, block.owned_views(matrix))
        rows = [*own_rows, *boundary]
        assert block.local_rows(np.array(rows, np.int64)).tolist() == list(range(len(rows)))
        expected = np.where(is_own, numbers, np.nan)[np.ix_(rows, columns)]
        np.testing.assert_array_equal(matrix, expected)
        assert sum(view.numel() for view in block.owned_views(matrix)) == is_own.sum()
        block.store(block.owned_views(-matrix), values)  # only the bucket's elements change
        changed = sorted(-value for each in values for value in each.tolist() if -1e5 < value < 0)
        assert changed == sorted(numbers[is_own])


@quick
@given(groups_cut())
def test_transposed_slices_hold_every_element_once(drawn):
    _, fragments, bucket = drawn
    world_size = len(fragments)
    elements = RowOwners.of(bucket, ShardLayout(fragments, 0)).elements(world_size)
    slices = column_slices(elements, bucket.width)
    assert (slices[0], slices[-1]) == (0, bucket.width)
    assert list(slices) == sorted(slices)
    shares = np.cumsum([0, *elements]) / max(elements.sum(), 1)
    assert np.abs(slices - shares * bucket.width).max() <= 0.5
    rectangles = [bucket.rectangles(own) for own in fragments]
    plans = []
    for rank in range(world_size):
        communicator = Communicator.alone(CPU)
        communicator.rank, communicator.world_size = rank, world_size
        plans.append(Transposition.plan(bucket.nodes, rectangles, slices, communicator))
    values = [numbered(bucket, own) for own in fragments]
    for rank, plan in enumerate(plans):
        matrix = torch.zeros(plan.block.own, plan.block.width, dtype=torch.float64)
        plan.block.load(values[rank], plan.block.owned_views(matrix))
        come = [(peer, part) for peer in range(world_size) for part in plans[peer].sends[rank]]
        for place, (peer, part) in zip(plan.places(matrix), come, strict=True):
            assert (place == 0).all()
            place.copy_(part.view(values[peer][part.fragment]))
        if plan.block.width:
            expected = numbers_of(bucket)[:, slices[rank] : slices[rank + 1]]
            np.testing.assert_array_equal(matrix, expected)


# The operator


@quick
@given(models(), st.sampled_from([1, 50, 300, 10**6]))
def test_buckets_hold_every_element_once_and_no_more_than_they_may(model, bucket_elements):
    graph = model.graph()
    operators = model.plan(graph, bucket_elements).operators
    times = [torch.zeros(p.numel, dtype=torch.float64) for p in model.parameters]
    for operator in operators:
        operator.load(times, operator.scratch.x)
        operator.scratch.x.values.add_(1)
        operator.store(operator.scratch.x, times)
        block = operator.block
        if block.stored * block.width > bucket_elements:  # no smaller slice, and no other group
            assert block.width <= 16
            assert block.stored in {group.bucket.nodes for group in graph.groups}
    assert all((each == 1).all() for each in times)


@quick
@given(models(), SEEDS, st.sampled_from([1, 50, 10**6]))
def test_operator_is_the_laplacian_of_the_oracle(model, seed, bucket_elements):
    signal = signal_of(model, seed)
    laplacian = model.dense_laplacian()
    np.testing.assert_allclose(model.graph().laplacian().toarray(), laplacian, atol=1e-7)
    expected = oracle.apply_function(laplacian, lambda values: values, signal, model.kind)
    assert_close(model.times_laplacian(signal, bucket_elements), expected, 1e-7)


@quick
@given(models(), SEEDS)
def test_operator_is_symmetric_and_its_spectrum_is_bounded(model, seed):
    x, y = signal_of(model, seed), signal_of(model, seed + 1)
    lx, ly = model.times_laplacian(x), model.times_laplacian(y)
    norm = product(x, x)
    np.testing.assert_allclose(product(y, lx), product(ly, x), rtol=1e-9, atol=1e-9)
    assert -1e-9 * norm <= product(x, lx) <= model.graph().lambda_max * norm * (1 + 1e-9)


@quick
@given(models(), SEEDS, st.floats(-3, 3), st.floats(-3, 3))
def test_operator_is_linear(model, seed, a, b):
    x, y = signal_of(model, seed), signal_of(model, seed + 1)
    together = model.times_laplacian(combined(a, x, b, y))
    expected = combined(a, model.times_laplacian(x), b, model.times_laplacian(y))
    assert_close(together, expected, 1e-10)


@quick
@given(models(normalized=False), SEEDS)
def test_a_signal_equal_at_all_nodes_has_frequency_zero(model, seed):
    """Any row of numbers, the same at all nodes of its width."""
    generator = np.random.default_rng(seed)
    row = {width: generator.standard_normal(width) for width in {p.width for p in model.parameters}}
    constant = {
        p.name: oracle.from_nodes(np.tile(row[p.width], (p.nodes, 1)), p.shape, p.kind)
        for p in model.parameters
    }
    for name, each in model.times_laplacian(constant).items():
        np.testing.assert_allclose(each, 0, atol=1e-9, err_msg=name)


# The filter


@quick
@given(models(), SEEDS, RESPONSES, st.floats(0, 1))
def test_filter_is_that_of_the_dense_eigenbasis(model, seed, response, strength):
    signal = signal_of(model, seed)
    expected = oracle.apply_function(
        model.dense_laplacian(),
        lambda values: 1 - strength + strength * response(values),
        signal,
        model.kind,
    )
    assert_close(model.filtered(signal, response, strength), expected, 1e-5)


@quick
@given(models(least=2, families=(SIMILARITY,)), SEEDS, st.data())
def test_filter_does_not_care_how_nodes_of_a_parameter_are_numbered(model, seed, data):
    name = data.draw(st.sampled_from(list(model.weights)))
    assert_equivariant(model, [name], signal_of(model, seed), data)


@quick
@given(models(least=2, families=(DEPTH, SIMILARITY)), SEEDS, st.data())
def test_filter_does_not_care_how_nodes_of_a_role_are_numbered(model, seed, data):
    """In all blocks alike, so that depth still joins the same nodes."""
    chosen = data.draw(st.sampled_from(model.parameters))
    names = [p.name for p in model.parameters if (p.role, p.shape) == (chosen.role, chosen.shape)]
    assert_equivariant(model, names, signal_of(model, seed), data)


def assert_equivariant(model, names, signal, data):
    """Relabelling nodes of some parameters relabels the Laplacian and the filtered signal."""
    [nodes] = {p.nodes for p in model.parameters if p.name in names}
    order = np.array(data.draw(st.permutations(range(nodes))))

    def relabelled(arrays):
        return {
            name: oracle.from_nodes(oracle.as_nodes(a, model.kind)[order], a.shape, model.kind)
            if name in names
            else a
            for name, a in arrays.items()
        }

    other = model._replace(weights=relabelled(model.weights))
    first, total = oracle.numbering(model.weights, model.kind)
    node = np.arange(total)
    for name in names:
        node[first[name] : first[name] + len(order)] = first[name] + order
    laplacian = model.graph().laplacian().toarray()
    np.testing.assert_allclose(
        other.graph().laplacian().toarray(), laplacian[np.ix_(node, node)], atol=1e-7
    )
    response = Heat(1.0)
    expected = relabelled(model.filtered(signal, response))
    assert_close(other.filtered(relabelled(signal), response), expected, 1e-5)
