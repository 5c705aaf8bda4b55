"""Nodes, roles and edge families: pure functions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spectral_ds.geometry.buckets import linked_parameters
from spectral_ds.graph import (
    Depth,
    Edges,
    Pair,
    ParameterNodes,
    Ring,
    Similarity,
    UnknownHeadWidthError,
    match_parameters,
)
from spectral_ds.graph.similarity import COSINE_STEPS, gaussian_weight, nearest
from spectral_ds.sketches import gaussian_projection, sketch_size
from spectral_ds.stack import facts_of

KINDS = ["row", "column", "element"]


@pytest.mark.parametrize(
    ("name", "shape", "role", "block"),
    [
        ("model.layers.12.mlp.up.weight", (8, 3), "model.layers.*.mlp.up.weight", 12),
        ("h.0.experts.3.weight", (4, 2, 5), "h.*.experts.3.weight", 0),
        ("norm.weight", (7,), "norm.weight", None),
        ("layer2.weight", (2, 2), "layer2.weight", None),
    ],
)
def test_roles_drop_the_block(name, shape, role, block):
    nodes = ParameterNodes(name, shape)
    assert (nodes.role, nodes.block) == (role, block)


@pytest.mark.parametrize(
    ("shape", "nodes"),
    [
        # (nodes, width) by row, column, element, parameter
        ((8, 3), [(8, 3), (3, 8), (24, 1), (1, 24)]),
        ((4, 2, 5), [(4, 10), (10, 4), (40, 1), (1, 40)]),
        ((7,), [(1, 7), (1, 7), (7, 1), (1, 7)]),
        ((), [(1, 1), (1, 1), (1, 1), (1, 1)]),
        ((1, 6), [(1, 6), (6, 1), (6, 1), (1, 6)]),
        ((6, 1), [(6, 1), (1, 6), (6, 1), (1, 6)]),
    ],
)
def test_nodes_and_their_width_by_kind(shape, nodes):
    found = [ParameterNodes("w", shape, kind) for kind in (*KINDS, "parameter")]
    assert [(each.nodes, each.width) for each in found] == nodes


def test_patterns_choose_parameters_and_report_what_matches_nothing():
    names = ["a.weight", "a.bias", "lm_head.weight"]
    assert match_parameters(names, ["*"], ["*lm_head*", "*.gone"]) == (
        ["a.weight", "a.bias"],
        ["*.gone"],
    )
    assert match_parameters(names, ["b*"], []) == ([], ["b*"])


# Edge families


def first_nodes(parameters):
    return np.cumsum([0, *(p.nodes for p in parameters)])


def edges_of(family, parameters, sources=None):
    """The directed edges of a family, sorted, from all nodes or from some."""
    first = first_nodes(parameters)
    sources = np.arange(first[-1]) if sources is None else np.array(sources)
    edges = family.edges(parameters, first, sources)
    assert (edges.weight == 1).all()
    return sorted(zip(edges.source.tolist(), edges.target.tolist(), strict=True))


def test_depth_joins_rows_to_the_next_block_present():
    parameters = [
        ParameterNodes("l.0.w", (2, 3)),
        ParameterNodes("l.5.w", (2, 3)),
        ParameterNodes("l.2.w", (2, 3)),
        ParameterNodes("l.3.w", (4, 3)),  # another shape
        ParameterNodes("w", (2, 3)),  # no block
    ]
    assert sorted(Depth().links(parameters)) == [(0, 2), (2, 1)]
    # rows of l.0 (one of two) and l.2
    assert edges_of(Depth(), parameters, [0, 4, 5]) == [(0, 4), (4, 2), (5, 3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_ring_joins_each_node_to_the_next_of_its_parameter(kind, count):
    shape = (5, count) if kind == "column" else (count, 5)
    parameters = [ParameterNodes("a", (3, 5), kind), ParameterNodes("b", shape, kind)]
    expected, first = [], 0
    for parameter in parameters:
        nodes = {"row": parameter.shape[0], "column": parameter.shape[1]}
        n = nodes.get(kind, parameter.numel)
        for r in range(n):
            if n > 1:
                expected.append((first + r, first + (r + 1) % n))
        first += n
    assert edges_of(Ring(), parameters) == sorted(expected)
    assert Ring().links(parameters) == []
    last = first - 1  # the ring closes from its last node, asked for alone
    assert edges_of(Ring(), parameters, [last]) == [e for e in expected if e[0] == last]


def attention(query_rows, key_rows, kind="row", names=("q_proj", "k_proj"), columns=6):
    """Weights and biases of one block, the key first."""
    query, key = (f"layers.0.self_attn.{name}" for name in names)
    return [
        ParameterNodes(f"{key}.weight", (key_rows, columns), kind),
        ParameterNodes(f"{key}.bias", (key_rows,), kind),
        ParameterNodes(f"{query}.weight", (query_rows, columns), kind),
        ParameterNodes(f"{query}.bias", (query_rows,), kind),
    ]


def same_nodes(parameters, pairs):
    first = first_nodes(parameters)
    return sorted(
        (first[a] + node, first[b] + node) for a, b in pairs for node in range(parameters[a].nodes)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "names",
    [
        ("q_proj", "k_proj"),
        ("query", "key"),
        ("q_lin", "k_lin"),
        ("wq", "wk"),
        ("gate_proj", "up_proj"),
        ("w1", "w3"),
    ],
)
def test_pair_joins_equal_nodes_of_weights_and_biases(kind, names):
    parameters = attention(8, 8, kind, names)
    assert sorted(Pair().links(parameters)) == [(2, 0), (3, 1)]
    assert edges_of(Pair(), parameters) == same_nodes(parameters, [(2, 0), (3, 1)])
    first = first_nodes(parameters)
    assert (
        edges_of(Pair(), parameters, [0, first[2], first[2] + 1])
        == (same_nodes(parameters, [(2, 0)])[:2])
    )


class Tower(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config


class OfTwo:
    """The config of a model that looks and reads."""

    def __init__(self, text):
        self.text = text

    def get_text_config(self):
        if self.text is None:
            raise ValueError("several")
        return self.text


@pytest.mark.parametrize("tells", [True, False])
def test_the_head_width_is_that_of_the_part_that_reads_text(tells):
    seen, read = (SimpleNamespace(num_attention_heads=4, hidden_size=w) for w in (64, 128))
    model = Tower(OfTwo(read if tells else None))
    model.vision, model.text = Tower(seen), Tower(read)
    assert facts_of([model], {}).head_width == (32 if tells else None)
    model.vision.config = read
    assert facts_of([model], {}).head_width == 32


@pytest.mark.parametrize("kind", ["row", "element"])
@pytest.mark.parametrize(
    ("heads", "groups", "head_width"), [(4, 2, 3), (6, 2, 1), (6, 3, 4), (4, 1, 2), (2, 2, 3)]
)
def test_pair_joins_a_query_head_to_the_head_of_its_group(kind, heads, groups, head_width):
    columns = 5
    parameters = attention(heads * head_width, groups * head_width, kind, columns=columns)
    first = first_nodes(parameters)
    expected = []
    for head in range(heads):
        group = head // (heads // groups)  # as transformers repeats keys
        for row in range(head_width):
            query, key = head * head_width + row, group * head_width + row
            for column in range(columns if kind == "element" else 1):
                per_row = columns if kind == "element" else 1
                a, b = query * per_row + column, key * per_row + column
                expected.append((first[2] + a, first[0] + b))
    if heads == groups:  # biases are joined only if they have equal shapes
        expected += same_nodes(parameters, [(3, 1)])
    assert edges_of(Pair(head_width), parameters) == sorted(expected)


def test_pair_leaves_columns_of_grouped_heads_alone():
    assert Pair(3).links(attention(12, 6, "column")) == []
    assert Pair().links(attention(12, 6, "column")) == []


@pytest.mark.parametrize(
    ("head_width", "rows", "problem"),
    [
        (None, (12, 6), "does not tell the width of a head"),
        (4, (12, 6), "heads of 4 rows do not divide"),
        (12, (12, 6), "heads of 12 rows do not divide"),
        (2, (10, 4), "heads of 2 rows do not divide"),  # 5 query heads, 2 of keys
        (2, (4, 8), "heads of 2 rows do not divide"),  # more keys than queries
    ],
)
def test_pair_needs_a_head_width_that_makes_groups(head_width, rows, problem):
    with pytest.raises(UnknownHeadWidthError) as caught:
        Pair(head_width).links(attention(*rows))
    for word in (problem, "q_proj.weight", "k_proj.weight", "set head_width", *map(str, rows)):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ["layers.0.q_proj.weight", "layers.1.k_proj.weight"],  # of two blocks
        ["q_proj.weight", "k_proj.weight"],  # of none
        ["layers.0.a.q_proj.weight", "layers.0.b.k_proj.weight"],  # of two modules
        ["layers.0.q_projection.weight", "layers.0.k_projection.weight"],
        ["layers.0.q_proj.weight", "layers.0.v_proj.weight"],
        ["layers.0.q_proj.weight"],  # the key is frozen
    ],
)
def test_pair_joins_only_partners_of_one_block(names):
    assert Pair().links([ParameterNodes(name, (4, 4)) for name in names]) == []


def test_pair_leaves_partners_of_other_input_widths_alone():
    shapes = {"layers.0.query.weight": (4, 6), "layers.0.key.weight": (4, 8)}
    assert Pair(2).links([ParameterNodes(*each) for each in shapes.items()]) == []


def test_nearest_breaks_ties_by_node_number_and_skips_zero_rows():
    features = torch.tensor([[1, 0], [2, 0], [0, 0], [3, 0], [0, 1.0]], dtype=torch.float64)
    source, target, distance = nearest(features, torch.arange(5), 2, 10**9)
    found = {}
    for s, t, d in zip(source.tolist(), target.tolist(), distance.tolist(), strict=True):
        found.setdefault(s, []).append((t, round(d, 9)))
    assert found == {
        0: [(1, 0), (3, 0)],
        1: [(0, 0), (3, 0)],
        3: [(0, 0), (1, 0)],
        4: [(0, 2), (1, 2)],
    }


def test_nearest_does_not_depend_on_how_rows_are_divided():
    features = torch.randn(50, 6, dtype=torch.float64)
    features[20:40] = features[0:20]  # every row has an equal twin
    whole = nearest(features, torch.arange(50), 4, 10**9)
    parts = [nearest(features, rows, 4, 10**9) for rows in torch.arange(50).split(7)]
    for i in (0, 1):
        torch.testing.assert_close(whole[i], torch.cat([p[i] for p in parts]), rtol=0, atol=0)


def test_nodes_at_equal_distance_are_ordered_by_number_whatever_float32_rounded():
    twins = torch.tensor([[0.5, 0.75**0.5]]).repeat(20, 1)
    features = torch.cat((torch.tensor([[1.0, 0.0]]), twins))
    torch.manual_seed(0)
    rounded = (features * (1 + 1e-7 * torch.randn_like(features))).double()
    for compared, is_ordered in (("gradient", True), ("weights", False)):
        _, target, _ = nearest(rounded, torch.arange(1), 3, COSINE_STEPS[compared])
        assert (target.tolist() == [1, 2, 3]) == is_ordered


def test_a_scope_of_one_node_has_no_neighbours():
    source, _, _ = nearest(torch.ones(1, 3, dtype=torch.float64), torch.arange(1), 8, 10**9)
    assert len(source) == 0


def test_coinciding_pairs_weigh_one():
    assert gaussian_weight(torch.zeros(3), 0.0).tolist() == [1, 1, 1]
    assert gaussian_weight(torch.tensor([2.0]), 0.5).item() == pytest.approx(np.exp(-2))


def test_projection_is_drawn_once_and_only_for_long_features():
    assert gaussian_projection(4, 4, seed=0) is None
    assert gaussian_projection(9, 0, seed=0) is None
    assert [sketch_size(9, width) for width in (0, 4, 9, 12)] == [9, 4, 9, 9]
    first, second = (gaussian_projection(9, 4, seed=3) for _ in range(2))
    assert first.shape == (9, 4)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first, gaussian_projection(9, 4, seed=4))


# Edges and groups


def test_combining_takes_the_rule_for_equal_edges():
    edges = Edges(np.array([1, 0, 1]), np.array([0, 1, 0]), np.array([2.0, 5.0, 3.0]))
    for rule, expected in ((np.maximum, [5, 3]), (np.add, [5, 5])):
        combined = edges.combined(rule)
        assert combined.source.tolist() == [0, 1]
        assert combined.weight.tolist() == expected


def test_edges_are_repeated_shifted_and_chosen():
    edges = Edges(np.array([0, 1]), np.array([1, 2]), np.array([2.0, 5.0]))
    repeated = edges.repeated(3)  # node n becomes nodes 3n, 3n + 1, 3n + 2
    assert list(zip(repeated.source, repeated.target, repeated.weight, strict=True)) == [
        *((copy, 3 + copy, 2) for copy in range(3)),
        *((3 + copy, 6 + copy, 5) for copy in range(3)),
    ]
    shifted = edges.shifted(4).from_sources(np.array([5, 6]))
    assert (shifted.source.tolist(), shifted.target.tolist()) == ([5], [6])
    by_source = Edges(*(each[::-1].copy() for each in vars(repeated).values())).by_source()
    for ranges in ([(0, 2), (4, 6)], [(3, 3)], []):
        nodes = np.array([n for first, end in ranges for n in range(first, end)], np.int64)
        wanted, found = by_source.from_sources(nodes), by_source.from_ranges(ranges)
        for name, values in vars(wanted).items():
            np.testing.assert_array_equal(vars(found)[name], values)


def test_groups_hold_equal_widths_and_no_edge_leaves_them():
    parameters = [
        ParameterNodes(f"l.{block}.{name}", shape)
        for block in range(3)
        for name, shape in {"a": (4, 3), "b": (5, 3), "c": (4, 2)}.items()
    ]
    by_role = [[f"l.{block}.{name}" for block in range(3)] for name in "abc"]
    alone = [[p.name] for p in parameters]
    for families, expected in (
        ([Depth()], by_role),
        ([Similarity()], alone),
        ([Ring()], alone),
        ([Similarity(scope="role"), Ring()], by_role),
        ([Ring(), Depth()], by_role),
    ):
        groups = linked_parameters(parameters, families)
        names = [[p.name for p in group] for group in groups]
        assert sorted(names) == sorted(expected)
        assert all(len({p.width for p in group}) == 1 for group in groups)
