"""Nodes, roles, edge families: pure functions."""

import numpy as np
import pytest
import torch

from spectral_ds.graph import Depth, Edges, ParameterNodes, Similarity, match_parameters
from spectral_ds.graph.similarity import gaussian_weight, nearest
from spectral_ds.laplacian import make_buckets


@pytest.mark.parametrize(
    ("name", "shape", "role", "block", "rows", "width"),
    [
        ("model.layers.12.mlp.up.weight", (8, 3), "model.layers.*.mlp.up.weight", 12, 8, 3),
        ("h.0.experts.3.weight", (4, 2, 5), "h.*.experts.3.weight", 0, 4, 10),
        ("norm.weight", (7,), "norm.weight", None, 1, 7),
        ("scale", (), "scale", None, 1, 1),
        ("layer2.weight", (2, 2), "layer2.weight", None, 2, 2),
    ],
)
def test_nodes_are_rows_and_roles_drop_the_block(name, shape, role, block, rows, width):
    nodes = ParameterNodes(name, shape)
    assert (nodes.role, nodes.block, nodes.rows, nodes.width) == (role, block, rows, width)


def test_patterns_choose_parameters_and_report_what_matches_nothing():
    names = ["a.weight", "a.bias", "lm_head.weight"]
    assert match_parameters(names, ["*"], ["*lm_head*", "*.gone"]) == (
        ["a.weight", "a.bias"],
        ["*.gone"],
    )
    assert match_parameters(names, ["b*"], []) == ([], ["b*"])


def first_nodes(parameters):
    return np.cumsum([0, *(p.rows for p in parameters)])


def test_depth_joins_rows_to_the_next_block_present():
    parameters = [
        ParameterNodes("l.0.w", (2, 3)),
        ParameterNodes("l.5.w", (2, 3)),
        ParameterNodes("l.2.w", (2, 3)),
        ParameterNodes("l.3.w", (4, 3)),  # another shape
        ParameterNodes("w", (2, 3)),  # no block
    ]
    family = Depth()
    assert sorted(family.links(parameters)) == [(0, 2), (2, 1)]
    sources = np.array([0, 4, 5])  # rows of l.0 (one of two) and l.2
    edges = family.edges(parameters, first_nodes(parameters), sources)
    pairs = sorted(zip(edges.source.tolist(), edges.target.tolist(), strict=True))
    assert pairs == [(0, 4), (4, 2), (5, 3)]
    assert (edges.weight == 1).all()


def test_nearest_breaks_ties_by_node_number_and_skips_zero_rows():
    features = torch.tensor([[1, 0], [2, 0], [0, 0], [3, 0], [0, 1.0]], dtype=torch.float64)
    source, target, distance = nearest(features, torch.arange(5), 2)
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
    whole = nearest(features, torch.arange(50), 4)
    parts = [nearest(features, rows, 4) for rows in torch.arange(50).split(7)]
    for i in (0, 1):
        torch.testing.assert_close(whole[i], torch.cat([p[i] for p in parts]), rtol=0, atol=0)


def test_a_scope_of_one_node_has_no_neighbours():
    source, _, _ = nearest(torch.ones(1, 3, dtype=torch.float64), torch.arange(1), 8)
    assert len(source) == 0


def test_coinciding_pairs_weigh_one():
    assert gaussian_weight(torch.zeros(3), 0.0).tolist() == [1, 1, 1]
    assert gaussian_weight(torch.tensor([2.0]), 0.5).item() == pytest.approx(np.exp(-2))


def test_projection_is_drawn_once_and_only_for_long_features():
    family = Similarity(sketch_width=4)
    assert family.projection(4, 0) is None
    assert Similarity(sketch_width=0).projection(9, 0) is None
    torch.testing.assert_close(family.projection(9, 3), family.projection(9, 3))
    assert not torch.equal(family.projection(9, 3), family.projection(9, 4))


def test_combining_takes_the_rule_for_equal_edges():
    edges = Edges(np.array([1, 0, 1]), np.array([0, 1, 0]), np.array([2.0, 5.0, 3.0]))
    for rule, expected in ((np.maximum, [5, 3]), (np.add, [5, 5])):
        combined = edges.combined(rule)
        assert combined.source.tolist() == [0, 1]
        assert combined.weight.tolist() == expected


def test_buckets_hold_equal_widths_and_no_edge_leaves_them():
    parameters = [
        ParameterNodes(f"l.{block}.{name}", shape)
        for block in range(3)
        for name, shape in {"a": (4, 3), "b": (5, 3), "c": (4, 2)}.items()
    ]
    for families, limit in (([Depth()], 1), ([Depth()], 10**6), ([Similarity()], 30)):
        buckets = make_buckets(parameters, families, limit)
        bucket_of = {p.name: i for i, bucket in enumerate(buckets) for p in bucket.parameters}
        assert len(bucket_of) == len(parameters)
        assert all(len({p.width for p in bucket.parameters}) == 1 for bucket in buckets)
        for family in families:
            for a, b in family.links(parameters):
                assert bucket_of[parameters[a].name] == bucket_of[parameters[b].name]
    assert len(make_buckets(parameters, [Depth()], 1)) == 3  # one a role
    assert len(make_buckets(parameters, [Depth()], 10**6)) == 2  # one a width
