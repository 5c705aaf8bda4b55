"""What is said of methods: chosen on validation data, reported on test data, seed by seed."""

import math
import re
from dataclasses import replace
from urllib.parse import unquote

import numpy as np
import pytest

from spectral_ds.cli.compare.analysis import INTERPOLATED, analyse
from spectral_ds.cli.compare.figures import curves, frontiers
from spectral_ds.cli.compare.material import FORGETTING
from spectral_ds.cli.compare.report import verdict_of, write
from spectral_ds.cli.compare.settings import Comparison, MethodConfig, TaskConfig

SEEDS = (0, 1, 2)
# Of a seed, on the losses of all methods alike.
LUCK = {0: 0.0, 1: 0.1, 2: -0.1}


def comparison(*methods, **more):
    return Comparison(
        model="m",
        kind="classification",
        learning_rates=(0.1, 0.2),
        seeds=SEEDS,
        tasks={"words": TaskConfig(data="d")},
        general={"other": None},
        methods={"adamw": MethodConfig()} | {name: MethodConfig() for name in methods},
        **more,
    )


def rows(method, rate, validation, test, forgetting, alpha=1.0, noise=(0.0, 0.0, 0.0), **more):
    """Of each seed; `forgetting` is the same on both parts."""
    return [
        {
            "task": "words",
            "method": method,
            "setting": "",
            "learning_rate": rate,
            "seed": seed,
            "alpha": alpha,
            "seconds": 1.0,
            "step_seconds": 1.0,
            "memory": 100.0,
            "perturbation": 1.0,
            "validation.loss": validation + LUCK[seed],
            "validation.accuracy": 0.5,
            "validation.forgetting": forgetting,
            "test.loss": test + LUCK[seed] + noise[seed],
            "test.accuracy": 0.5 + 0.01 * seed,
            "test.forgetting": forgetting,
        }
        | more
        for seed in SEEDS
    ]


def curve(method, rate, *losses):
    return [
        {"task": "words", "method": method, "setting": "", "learning_rate": rate, "seed": seed,
         "step": step, "seconds": float(step), "loss": loss + LUCK[seed]}
        for seed in SEEDS
        for step, loss in enumerate(losses, start=1)
    ]  # fmt: skip


BASE = [
    *rows("adamw", 0.1, validation=0.50, test=0.70, forgetting=0.4),
    *rows("adamw", 0.2, validation=0.55, test=0.40, forgetting=0.8),  # better on test data alone
    *rows("adamw", 0.1, validation=0.80, test=0.90, forgetting=0.2, alpha=0.5),
    *rows("adamw", 0.1, validation=1.00, test=1.10, forgetting=0.0, alpha=0.0),
]
OTHER = [
    *rows("other", 0.1, 0.45, 0.60, forgetting=0.3, noise=(0.01, 0.0, -0.01), step_seconds=1.5),
    *rows("other", 0.2, 0.60, 0.10, forgetting=0.5),
]
CURVES = [
    *curve("adamw", 0.1, 0.9, 0.5),
    *curve("other", 0.1, 0.45, 0.45),
    *curve("adamw", 0.2, 0.9, 0.5),
    *curve("other", 0.2, 0.9, 0.6),
]


def standings(*more, methods=("other",), curves=CURVES):
    found = analyse(comparison(*methods), "words", [*BASE, *OTHER, *more], curves, FORGETTING)
    return {each.method: each for each in found.standings}


def test_the_learning_rate_is_chosen_on_validation_data_and_the_loss_is_of_test_data():
    best = standings()["adamw"].best
    assert best.point.learning_rate == 0.1
    assert best.loss == pytest.approx(0.70)


def test_differences_are_paired_so_the_luck_of_a_seed_is_in_none():
    difference = standings()["other"].best.loss_difference
    assert difference.mean == pytest.approx(-0.10)
    # Only the noise is left: ± 0.01 over three seeds.
    assert difference.p == pytest.approx(2 * _tail(-0.10 / (0.01 / math.sqrt(3))), rel=1e-6)


def _tail(t):
    """P(T < t) of Student with 2 degrees of freedom."""
    return 0.5 * (1 + t / math.sqrt(2 + t * t))


def test_interpolations_of_the_baseline_stand_beside_it_as_a_method():
    best = standings()["adamw" + INTERPOLATED].best
    assert (best.point.alpha, best.forgetting) == (0.5, pytest.approx(0.2))
    assert best.loss_difference.mean == pytest.approx(0.2)


def test_at_equal_forgetting_a_method_is_held_against_the_frontier_of_the_baseline():
    equal = standings()["other"].equal
    # At a forgetting of 0.3, half-way between 0.90 and 0.70, it is 0.80 on the frontier.
    assert equal.point.learning_rate == 0.1
    assert equal.difference.mean == pytest.approx(0.60 - 0.80)


def test_a_point_that_only_test_data_puts_on_the_frontier_is_not_on_it():
    # At 0.8 the baseline has the least test loss, but not the least validation loss.
    found = standings(
        *rows("late", 0.1, 0.4, 0.65, forgetting=0.9, noise=(0.01, 0.0, -0.01)),
        methods=("other", "late"),
        curves=[*CURVES, *curve("late", 0.1, 0.4)],
    )
    assert found["late"].equal.difference.mean == pytest.approx(0.65 - 0.70)


def test_several_methods_make_each_p_value_larger():
    more = rows("more", 0.1, 0.45, 0.60, forgetting=0.3, noise=(0.01, 0.0, -0.01))
    curves = [*CURVES, *curve("more", 0.1, 0.4)]
    alone = standings()["other"].best.p
    together = standings(*more, methods=("other", "more"), curves=curves)["other"].best.p
    # Of "adamw, interpolated" p is 0; so p of the next counts once alone, and twice of two.
    assert together == pytest.approx(2 * alone, rel=1e-6)


def test_a_run_that_diverged_is_never_chosen():
    lost = rows("adamw", 0.4, float("nan"), float("nan"), forgetting=float("nan"))
    curves = [*CURVES, *curve("adamw", 0.4, float("nan"))]
    found = standings(*lost, curves=curves)
    assert found["adamw"].best.point.learning_rate == 0.1
    assert found["other"].equal.difference.mean == pytest.approx(0.60 - 0.80)


def test_a_setting_of_which_one_seed_diverged_is_never_chosen_at_equal_forgetting():
    lost = rows("other", 0.05, 0.1, 0.1, forgetting=0.3, alpha=1.0)
    lost[1] |= {"validation.loss": float("nan"), "test.loss": float("nan")}
    found = analyse(comparison("other"), "words", [*lost, *BASE, *OTHER], CURVES, FORGETTING)
    [other] = [each for each in found.standings if each.method == "other"]
    assert other.equal.difference.mean == pytest.approx(0.60 - 0.80)


def test_interpolations_of_the_baseline_are_its_frontier_and_no_other_method():
    found = standings()
    assert math.isnan(found["adamw" + INTERPOLATED].equal.p)
    assert found["other"].equal.p == pytest.approx(
        2 * _tail(-0.20 / (0.01 / math.sqrt(3))), rel=1e-6
    )


def test_costs_are_relative_to_the_baseline():
    cost = standings()["other"].cost
    assert (cost.step, cost.memory) == (1.5, 1.0)
    assert (cost.steps_to, cost.seconds_to, cost.reached) == (1.0, 1.0, 3)


def test_what_is_done_after_the_baselines_runs_costs_what_they_did():
    """Also where they were trained again, for rows that were added later, on a faster machine."""
    whole = comparison("other")
    methods = whole.methods | {"after": MethodConfig(after="adamw", by="early_stopping")}
    later = rows("after", 0.1, 0.5, 0.6, forgetting=0.3, step_seconds=0.5, memory=90.0)
    found = analyse(
        replace(whole, methods=methods), "words", [*BASE, *OTHER, *later], CURVES, FORGETTING
    )
    cost = next(each.cost for each in found.standings if each.method == "after")
    assert (cost.step, cost.memory) == (1.0, 1.0)


def test_seeds_that_the_baseline_lacks_do_not_count():
    fewer = [row for row in BASE if row["seed"] != 1]
    found = analyse(comparison("other"), "words", [*fewer, *OTHER], CURVES, FORGETTING)
    assert [each.seeds for each in found.standings] == [2, 2, 2]


def test_without_the_baseline_nothing_is_said():
    assert analyse(comparison("other"), "words", OTHER, CURVES, FORGETTING) is None


def test_the_verdict_names_what_differs_and_nothing_else():
    same = rows("same", 0.1, 0.5, 0.70, forgetting=0.4, noise=(0.01, 0.0, -0.01))
    found = analyse(
        comparison("other", "same"), "words", [*BASE, *OTHER, *same],
        [*CURVES, *curve("same", 0.1, 0.5)], FORGETTING,
    )  # fmt: skip
    lines = verdict_of(found, comparison("other", "same"))
    lower = next(line for line in lines if "lower at its best" in line)
    assert "other by 0.100" in lower
    assert "same" not in " ".join(lines)


def test_the_report_says_what_was_chosen_and_how_it_was_made(tmp_path):
    write(comparison("other"), [*BASE, *OTHER], CURVES, tmp_path, "spectral-ds compare …")
    report = (tmp_path / "report.md").read_text()
    assert "| other | 3 | at 0.1 | 0.6000 | -0.1000 [" in report
    assert "`spectral-ds compare …`" in report


def test_figures_are_linked_whatever_the_name_of_a_task(tmp_path):
    name = "good books (new) 100 %é"
    own = [row | {"task": name} for row in (*BASE, *OTHER)]
    named = replace(comparison("other"), tasks={name: TaskConfig(data="d")})
    learned = [row | {"task": name} for row in CURVES]
    write(named, own, learned, tmp_path, "spectral-ds compare …")
    links = re.findall(r"!\[[^]]*\]\(([^ ()]+)\)", (tmp_path / "report.md").read_text())
    assert {unquote(link) for link in links} == {each.name for each in tmp_path.glob("*.png")}


def labels(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_figures_name_the_baseline_and_what_is_drawn():
    found = analyse(
        comparison("other", "same", "third"), "words",
        [*BASE, *OTHER, *rows("same", 0.1, 0.7, 0.7, 0.4), *rows("third", 0.1, 0.7, 0.7, 0.5)],
        [*CURVES, *curve("same", 0.1, 0.5)], FORGETTING,
    )  # fmt: skip
    assert labels(frontiers(found, "x")) == ["adamw", "other", "same", "third"]
    assert labels(frontiers(found, "x", ["third", "other"])) == [
        "adamw", "third", "other", "other methods",
    ]  # fmt: skip
    assert labels(curves(found, ["third", "same"])) == ["adamw", "same"]


def test_a_frontier_is_drawn_of_what_validation_data_chose():
    found = analyse(comparison("other"), "words", [*BASE, *OTHER], CURVES, FORGETTING)
    [line] = [each for each in frontiers(found, "x").axes[0].lines if each.get_label() == "adamw"]
    expected = [[0.0, 1.10], [0.2, 0.90], [0.4, 0.70]]  # means over seeds
    assert line.get_xydata() == pytest.approx(np.array(expected))


def test_lost_curves_leave_only_the_time_to_a_loss_unknown():
    found = standings(curves=[])
    for each in found.values():
        assert each.cost.steps_to is each.cost.seconds_to is each.cost.reached is None
    assert found["other"].best == standings()["other"].best
