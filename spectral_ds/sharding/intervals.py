"""Algebra of half-open integer intervals, vectorized.

A set of integers is an int64 array of shape (n, 2): rows [start, end), sorted, disjoint and not
touching. Shards, boundary rows and cut rows are all such sets in one flat address space.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Intervals: TypeAlias = npt.NDArray[np.int64]
Indices: TypeAlias = npt.NDArray[np.int64]


def merge(intervals: Intervals) -> Intervals:
    """The union of any intervals (unsorted, overlapping, possibly empty) as a set."""
    intervals = intervals[intervals[:, 1] > intervals[:, 0]]
    if len(intervals) == 0:
        return np.zeros((0, 2), np.int64)
    intervals = intervals[np.argsort(intervals[:, 0], kind="stable")]
    reach = np.maximum.accumulate(intervals[:, 1])
    first = np.concatenate(([True], intervals[1:, 0] > reach[:-1]))
    last = np.concatenate((first[1:], [True]))
    return np.stack((intervals[first, 0], reach[last]), axis=1)


def contains(intervals: Intervals, points: Indices) -> npt.NDArray[np.bool_]:
    """For each point, whether the set holds it."""
    if len(intervals) == 0:
        return np.zeros(len(points), np.bool_)
    at = np.searchsorted(intervals[:, 0], points, side="right") - 1
    return np.asarray((at >= 0) & (points < intervals[np.maximum(at, 0), 1]))


def cut(intervals: Intervals, points: Indices) -> Intervals:
    """Intervals cut at the given points; pieces may touch."""
    if len(intervals) == 0:
        return intervals
    points = np.unique(points)
    inside = points[contains(intervals, points)]
    inside = inside[~np.isin(inside, intervals[:, 0])]
    starts = np.sort(np.concatenate((intervals[:, 0], inside)))
    ends = np.sort(np.concatenate((intervals[:, 1], inside)))
    return np.stack((starts, ends), axis=1)


def subtract(intervals: Intervals, other: Intervals) -> Intervals:
    """The integers of the first set that are not in the second."""
    pieces = cut(intervals, other.reshape(-1))
    return merge(pieces[~contains(other, pieces[:, 0])])


def total(intervals: Intervals) -> int:
    """How many integers the set holds."""
    return int((intervals[:, 1] - intervals[:, 0]).sum())


def members(intervals: Intervals) -> Indices:
    """All integers of the intervals, interval by interval."""
    lengths = intervals[:, 1] - intervals[:, 0]
    before = np.cumsum(lengths) - lengths
    return np.repeat(intervals[:, 0] - before, lengths) + np.arange(lengths.sum())


def positions(intervals: Intervals, points: Indices) -> Indices:
    """For each point of the set, how many smaller ones the set has."""
    lengths = intervals[:, 1] - intervals[:, 0]
    before = np.cumsum(lengths) - lengths
    at = np.searchsorted(intervals[:, 0], points, side="right") - 1
    return np.asarray(points - intervals[at, 0] + before[at])
