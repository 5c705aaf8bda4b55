"""Where nodes lie in memory: pure functions."""

import numpy as np
import pytest
import torch

from spectral_ds.geometry.buckets import Bucket, columns_at_once
from spectral_ds.geometry.rectangles import addresses, rectangles_of
from spectral_ds.graph import ParameterNodes
from spectral_ds.sharding import Fragment, by_parameter

KINDS = ["row", "column", "element"]

CUTS = {
    # of a 6 × 5 matrix, flattened: start, length
    "inside one row": (6, 3),
    "from inside a row to its end": (7, 3),
    "from a row's start to inside it": (10, 3),
    "over one row's edge": (8, 4),
    "cut rows at both ends": (8, 15),
    "a cut row before whole rows": (3, 17),
    "a cut row after whole rows": (5, 13),
    "whole rows": (10, 15),
    "one row": (10, 5),
    "everything": (0, 30),
    "one element": (13, 1),
    "the last element": (29, 1),
    "nothing": (12, 0),
    "nothing, at the end": (30, 0),
}
SHAPES = {
    "matrix": (6, 5),
    "tensor": (6, 1, 5),
    "one column": (30, 1),
    "one row": (1, 30),
    "vector": (30,),
}


def node_matrix(shape, kind):
    """Flat index of every element, (nodes, width)."""
    flat = np.arange(int(np.prod(shape)))
    if kind == "element":
        return flat.reshape(-1, 1)
    if kind == "parameter":
        return flat.reshape(1, -1)
    matrix = flat.reshape(shape[0] if len(shape) > 1 else 1, -1)
    return matrix.T if kind == "column" and len(shape) > 1 else matrix


def covered(rectangles, fragment, first_node):
    """{(node, column): flat index in the parameter} of what rectangles cover."""
    values = torch.arange(fragment.start, fragment.end)
    found = {}
    for part in rectangles:
        view = part.view(values)
        assert view.shape == (part.nodes, part.columns)
        assert part.numel == view.numel() > 0
        for (i, j), value in np.ndenumerate(view.numpy()):
            place = part.node - first_node + i, part.column + j
            assert place not in found
            found[place] = int(value)
    return found


@pytest.mark.parametrize("kind", [*KINDS, "parameter"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_rectangles_cover_a_fragment_whatever_a_node_is(kind, shape, cut):
    start, length = cut
    fragment = Fragment("w", start, length)
    first = 11
    rectangles = rectangles_of(ParameterNodes("w", shape, kind), first, fragment, index=4)
    assert len(rectangles) <= 3
    assert all(part.fragment == 4 for part in rectangles)
    matrix = node_matrix(shape, kind)
    owned = {
        place: int(flat) for place, flat in np.ndenumerate(matrix) if start <= flat < start + length
    }
    assert covered(rectangles, fragment, first) == owned
    width = matrix.shape[1]
    runs = addresses(rectangles, width)
    expected = sorted((first + node) * width + column for node, column in owned)
    assert [a for begin, end in runs for a in range(begin, end)] == expected


@pytest.mark.parametrize("kind", [*KINDS, "parameter"])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 30), (0, 2), (2, 4), (8, 29)],
)
def test_clipped_rectangles_are_those_columns_renumbered(kind, cut, low, high):
    start, length = cut
    fragment = Fragment("w", start, length)
    parts = rectangles_of(ParameterNodes("w", (6, 5), kind), 0, fragment, 0)
    clipped = [part.clipped(low, high) for part in parts]
    columns = node_matrix((6, 5), kind)[:, low:high]
    assert covered([part for part in clipped if part], fragment, 0) == {
        place: int(flat)
        for place, flat in np.ndenumerate(columns)
        if start <= flat < start + length
    }


@pytest.mark.parametrize("kind", KINDS)
def test_slices_of_a_bucket_hold_every_element_once(kind):
    shape = (3, 100) if kind == "row" else (100, 3)
    parameters = [ParameterNodes(name, shape, kind) for name in "ab"]
    bucket = Bucket.of(parameters)
    assert (bucket.nodes, bucket.width) == {
        "row": (6, 100), "column": (6, 100), "element": (600, 1)
    }[kind]  # fmt: skip
    matrix = np.concatenate([node_matrix(shape, kind) + 300 * i for i in range(2)])
    fragments = [Fragment("b", 50, 250), Fragment("c", 0, 9), Fragment("a", 0, 300)]
    values = [torch.arange(350, 600), torch.zeros(9), torch.arange(300)]
    slices = bucket.slices(columns_at_once(6 * 35, bucket.nodes))  # rounded to multiples of 16
    widths = [each.width for each in slices]
    assert widths == ([1] if kind == "element" else [32, 32, 32, 4])
    assert sum(each.numel for each in slices) == bucket.numel == 600
    left = 0
    for each, width in zip(slices, widths, strict=True):
        found = np.full((bucket.nodes, width), -1)
        for part in each.rectangles(by_parameter(fragments)):
            rows = slice(part.node, part.node + part.nodes)
            places = found[rows, part.column : part.column + part.columns]
            assert (places == -1).all()
            places[:] = part.view(values[part.fragment])
        expected = matrix[:, left : left + width]
        np.testing.assert_array_equal(found, np.where(
            (expected >= 300) & (expected < 350), -1, expected
        ))  # fmt: skip
        left += width


def test_a_slice_has_sixteen_columns_at_least():
    bucket = Bucket.of([ParameterNodes("a", (1000, 40))])
    slices = bucket.slices(columns_at_once(1, bucket.nodes))
    assert [(each.low, each.high) for each in slices] == [(0, 16), (16, 32), (32, 40)]
