"""Intervals against plain sets; layouts; errors that all ranks share."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import RankError

from spectral_ds.sharding import Communicator, Fragment, ShardLayout, ShardLayoutError, intervals


def as_set(runs):
    return {i for start, end in runs for i in range(start, end)}


def random_runs(generator, count):
    start = generator.integers(0, 60, count)
    return np.stack((start, start + generator.integers(0, 9, count)), axis=1).astype(np.int64)


@pytest.mark.parametrize("seed", range(40))
def test_intervals_agree_with_sets(seed):
    generator = np.random.default_rng(seed)
    raw_a, raw_b = (random_runs(generator, generator.integers(0, 9)) for _ in range(2))
    a, b = intervals.merge(raw_a), intervals.merge(raw_b)
    points = generator.integers(-2, 75, 12)
    assert as_set(a) == as_set(raw_a)
    assert all(a[1:, 0] > a[:-1, 1])  # sorted, disjoint, not touching
    assert as_set(intervals.subtract(a, b)) == as_set(a) - as_set(b)
    assert list(intervals.contains(a, points)) == [p in as_set(a) for p in points]
    pieces = intervals.cut(a, points)
    assert as_set(pieces) == as_set(a)
    assert intervals.total(pieces) == intervals.total(a)
    assert not any(start < p < end for start, end in pieces for p in points)
    assert intervals.members(a).tolist() == sorted(as_set(a))


@pytest.mark.parametrize(
    ("fragments", "message"),
    [
        ([[("a", 0, 4)], [("a", 3, 3)]], "element 3 of parameter 'a' is owned twice"),
        ([[("a", 0, 2)], [("a", 3, 3)]], "element 2 of parameter 'a' is owned by no rank"),
        ([[("a", 0, 2)], [("a", 2, 3)]], "end at element 5, but it has 6"),
        ([[], []], "end at element 0, but it has 6"),
    ],
)
def test_a_layout_with_gaps_or_overlaps_is_refused(fragments, message):
    layout = ShardLayout(tuple(tuple(Fragment(*f) for f in rank) for rank in fragments), 0)
    with pytest.raises(ShardLayoutError, match=message):
        layout.check({"a": 6})


def fail_on(rank):
    communicator = Communicator(None, torch.device("cpu"))
    with communicator.all_or_none():
        if dist.get_rank() == rank:
            raise ValueError("the disk of this rank is full")


def test_an_error_of_one_rank_reaches_all(ranks):
    outcomes = ranks(3).outcomes(fail_on, 2)
    assert all(isinstance(o, RankError) and o.kind == "ValueError" for o in outcomes)
    assert all("the disk of this rank is full" in o.message for o in outcomes)
    assert "rank 2" in outcomes[0].message


def fail_by_a_type_that_is_nowhere(rank):
    """As compiled extensions have them, whose types name a module that there is not."""
    kind = type("LostError", (Exception,), {"__module__": "no_such_module"})
    with Communicator(None, torch.device("cpu")).all_or_none():
        if dist.get_rank() == rank:
            raise kind("the disk of this rank is full")


def test_an_error_that_cannot_be_sent_reaches_all_by_its_message(ranks):
    first, second = ranks(2).outcomes(fail_by_a_type_that_is_nowhere, 1)
    assert (first.kind, second.kind) == ("RuntimeError", "LostError")
    assert "rank 1 failed: the disk of this rank is full" in first.message


def exchange(counts):
    communicator = Communicator(None, torch.device("cpu"))
    rank = communicator.rank
    destinations = np.repeat(np.arange(communicator.world_size), counts[rank]).astype(np.int64)
    rows = np.stack((np.full(len(destinations), rank), destinations), axis=1)
    order = np.random.default_rng(rank).permutation(len(rows))
    return communicator.exchange_rows(rows[order], destinations[order])


def test_rows_reach_their_destination_and_no_other(ranks):
    counts = [[0, 3, 1], [0, 0, 0], [2, 0, 5]]
    for rank, (rows, received) in enumerate(ranks(3).run(exchange, counts)):
        assert received.tolist() == [counts[source][rank] for source in range(3)]
        assert rows[:, 0].tolist() == np.repeat(np.arange(3), received).tolist()
        assert (rows[:, 1] == rank).all()
