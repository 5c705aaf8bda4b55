"""Who owns what, for any parameters, any edges and any cut of the parameters among ranks."""

import numpy as np
import torch
from any_model import CPU, groups_cut, numbered, numbers_of, quick, ranks_of
from hypothesis import given

from spectral_ds.geometry.block import LocalBlock
from spectral_ds.geometry.owners import RowOwners
from spectral_ds.laplacian.transpose import Transposition, column_slices
from spectral_ds.sharding import Communicator, ShardLayout, by_parameter, intervals


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
        block = LocalBlock.of(bucket.width, bucket.rectangles(by_parameter(own)), edges)
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
    rectangles = [bucket.rectangles(by_parameter(own)) for own in fragments]
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
