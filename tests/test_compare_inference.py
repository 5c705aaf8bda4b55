"""What differences between methods are worth: against closed forms, tables and simulation."""

import math

import numpy as np
import pytest

from spectral_ds.cli.compare.inference import Frontier, between, holm, on_front, paired


def test_the_p_value_is_students_of_paired_samples():
    # t = mean / (s / √n) = 2 / (1 / √3), with 2 degrees of freedom: p = 1 − t / √(2 + t²).
    t = 2 * math.sqrt(3)
    assert paired([1.0, 2.0, 3.0]).p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_intervals_of_normal_samples_cover_their_mean_about_as_often_as_they_say():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        found = paired(random.normal(0.3, 1.0, size=40).tolist())
        hits += found.low <= 0.3 <= found.high
    assert 0.85 <= hits / 60 <= 1.0


def test_few_pairs_have_no_interval_and_one_has_no_p():
    one, two = paired([0.5]), paired([0.5, 0.7])
    assert (one.mean, one.pairs) == (0.5, 1)
    assert math.isnan(one.p)
    assert math.isnan(two.low)
    assert 0 < two.p < 1


def test_a_control_that_is_always_equal_shows_no_difference():
    found = paired([0.0, 0.0, 0.0])
    assert (found.mean, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_holm_multiplies_the_least_p_by_their_number_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_holm_leaves_out_what_is_not_known():
    found = holm([float("nan"), 0.02, 0.6])
    assert math.isnan(found[0])
    assert found[1:] == pytest.approx([0.04, 0.6])


def test_no_corrected_p_is_above_one():
    assert holm([0.7, 0.9]) == [1.0, 1.0]


FRONTIER = Frontier([(0.0, 1.0), (0.5, 0.6), (0.8, 0.7)])


@pytest.mark.parametrize(
    ("forgetting", "loss"),
    [
        pytest.param(0.25, 0.8, id="between two points"),
        pytest.param(-1.0, 1.0, id="below all: that of the point that forgets least"),
        pytest.param(0.7, 0.6, id="a point that is worse does not count"),
        pytest.param(2.0, 0.6, id="above all"),
    ],
)
def test_a_frontier_is_the_least_loss_at_this_forgetting(forgetting, loss):
    assert float(FRONTIER.at(forgetting)) == pytest.approx(loss)


def test_points_on_the_front_are_beaten_by_none():
    points = [(0.2, 1.0), (0.1, 1.2), (0.3, 1.1), (0.4, 0.9), (0.4, 0.95)]
    assert on_front(points) == [1, 0, 3]


def test_the_height_between_two_frontiers_is_the_mean_over_their_common_range():
    low = Frontier([(0.0, 1.0), (1.0, 0.0)])
    high = Frontier([(0.5, 0.75), (2.0, 0.25)])  # at 0.5 it is 0.25 above, at 1 it is 0.583
    expected = (0.25 + (0.75 - 0.5 / 3)) / 2
    assert between([high], [low])[0] == pytest.approx(expected)
    assert between([low], [high])[0] == pytest.approx(-expected)


def test_frontiers_without_a_common_range_are_not_held_against_each_other():
    assert between([Frontier([(0.0, 1.0)])], [Frontier([(0.5, 1.0), (0.6, 0.9)])]) == []
