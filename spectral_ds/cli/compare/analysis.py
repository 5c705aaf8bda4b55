"""Analysis: from rows of results to what is to be said of each method.

Whatever is chosen, a learning rate, a setting, what lies on a frontier, is chosen by means over
seeds on validation data. What is reported is of test data.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf, isnan, nan
from statistics import fmean
from typing import TypeAlias

from spectral_ds.cli.compare.inference import (
    Difference,
    Frontier,
    between,
    holm,
    on_front,
    paired,
)
from spectral_ds.cli.compare.material import (
    ACCURACY,
    LOSS,
    TEST,
    VALIDATION,
    column,
)
from spectral_ds.cli.compare.results import Row
from spectral_ds.cli.compare.settings import Comparison
from spectral_ds.cli.compare.standing import Best, Cost, Equal, Place, Point, Standing, TaskAnalysis

# Of the baseline: what is made of its runs by interpolation with the weights before.
INTERPOLATED = ", interpolated"

# By seed.
Rows: TypeAlias = dict[int, Row]
Points: TypeAlias = dict[Point, Rows]


def analyse(
    comparison: Comparison, task: str, rows: Iterable[Row], curves: Iterable[Row], axis: str
) -> TaskAnalysis | None:
    """What rows of a task say; None without any of the baseline.

    Args:
        axis: what counts as forgetting, FORGETTING or DIVERGENCE.
    """
    by_method: dict[str, Points] = {name: {} for name in comparison.methods}
    for row in rows:
        if row["task"] == task and row["method"] in by_method:
            point = Point(row["learning_rate"], row["setting"], row["alpha"])
            by_method[row["method"]].setdefault(point, {})[row["seed"]] = row
    base = _complete(by_method.pop(comparison.baseline))
    if not base:
        return None
    seeds = set(next(iter(base.values())))
    own = [row for row in curves if row["task"] == task]
    interpolated = {point: own for point, own in base.items() if 0 < point.alpha < 1}
    methods = {comparison.baseline: base}
    if interpolated:
        methods[f"{comparison.baseline}{INTERPOLATED}"] = interpolated
    for name, points in by_method.items():
        if found := _complete(points, seeds):
            methods[name] = found
    standings = [
        _standing(comparison, name, points, base, own, axis) for name, points in methods.items()
    ]
    return TaskAnalysis(
        task,
        axis,
        _corrected(standings),
        {
            name: _front(points, _common(points, base), axis)
            for name, points in methods.items()
            if not name.endswith(INTERPOLATED)
        },
        {
            name: _curve(own, comparison, name, _best(points), points)
            for name, points in methods.items()
        },
    )


def trained_by(comparison: Comparison, name: str) -> str:
    """The method whose runs a method starts from; itself if it trains."""
    name = name.removesuffix(INTERPOLATED)
    return comparison.methods[name].after or name


def _complete(points: Points, seeds: set[int] | None = None) -> Points:
    """Points with rows of the same seeds: of those that most points have, among some."""
    counts: dict[frozenset[int], int] = {}
    for rows in points.values():
        key = frozenset(rows if seeds is None else rows.keys() & seeds)
        counts[key] = counts.get(key, 0) + 1
    counts.pop(frozenset(), None)
    if not counts:
        return {}
    most = max(counts, key=lambda key: (counts[key] * len(key), len(key)))
    return {
        point: {seed: rows[seed] for seed in sorted(most)}
        for point, rows in points.items()
        if most <= rows.keys()
    }


def _common(points: Points, base: Points) -> list[int]:
    """The seeds of both."""
    return sorted(next(iter(points.values())).keys() & next(iter(base.values())).keys())


def _mean(rows: Rows, name: str, seeds: Sequence[int] | None = None) -> float:
    mean = fmean(rows[seed][name] for seed in (rows if seeds is None else seeds))
    return inf if isnan(mean) else mean  # of a run that diverged: never the least


def _best(points: Points) -> Point:
    """Where the mean validation loss is least, of what is not interpolated if there is any."""
    whole = [point for point in points if point.alpha == 1] or list(points)
    return min(whole, key=lambda point: _mean(points[point], column(VALIDATION, LOSS)))


def _front(points: Points, seeds: Sequence[int], axis: str, part: str = TEST) -> list[list[Place]]:
    """Of the points that no other beats on validation data, by means over seeds: each seed's."""
    places = [
        tuple(_mean(rows, column(VALIDATION, what), seeds) for what in (axis, LOSS))
        for rows in points.values()
    ]
    found = list(points.values())
    return [
        [(found[at][s][column(part, axis)], found[at][s][column(part, LOSS)]) for s in seeds]
        for at in on_front(places)  # type: ignore[arg-type]
    ]


def _frontiers(points: Points, seeds: Sequence[int], axis: str, part: str = TEST) -> list[Frontier]:
    """Of each seed."""
    return [Frontier(places) for places in zip(*_front(points, seeds, axis, part), strict=True)]


def _over_frontier(
    rows: Rows, frontiers: Sequence[Frontier], seeds: Sequence[int], axis: str, part: str
) -> list[float]:
    """By how much the loss of a point is above frontiers, seed by seed."""
    return [
        rows[seed][column(part, LOSS)] - float(frontier.at(rows[seed][column(part, axis)]))
        for seed, frontier in zip(seeds, frontiers, strict=True)
    ]


def _standing(
    comparison: Comparison,
    name: str,
    points: Points,
    base: Points,
    curves: Sequence[Row],
    axis: str,
) -> Standing:
    seeds = _common(points, base)
    chosen, base_chosen = _best(points), _best(base)
    rows, base_rows = points[chosen], base[base_chosen]

    def difference(what: str) -> Difference:
        return paired(
            [rows[s][column(TEST, what)] - base_rows[s][column(TEST, what)] for s in seeds]
        )

    classifies = comparison.kind == "classification"
    loss = difference(LOSS)
    best = Best(
        chosen,
        _mean(rows, column(TEST, LOSS), seeds),
        _mean(rows, column(TEST, ACCURACY), seeds) if classifies else None,
        _mean(rows, column(TEST, axis), seeds),
        loss,
        difference(ACCURACY) if classifies else None,
        loss.p,
    )
    return Standing(
        name,
        len(seeds),
        best,
        _equal(points, base, seeds, axis),
        _cost(comparison, name, points, base, seeds, curves),
    )


def _equal(points: Points, base: Points, seeds: Sequence[int], axis: str) -> Equal:
    to_choose = _frontiers(base, seeds, axis, VALIDATION)

    def height(point: Point) -> float:
        mean = fmean(_over_frontier(points[point], to_choose, seeds, axis, VALIDATION))
        return inf if isnan(mean) else mean

    chosen = min((point for point in points if point.alpha > 0), key=height)
    frontiers, rows = _frontiers(base, seeds, axis), points[chosen]
    found = paired(_over_frontier(rows, frontiers, seeds, axis, TEST))
    heights = between(_frontiers(points, seeds, axis), frontiers)
    area = paired(heights) if heights else None
    return Equal(
        chosen,
        _mean(rows, column(TEST, LOSS), seeds),
        _mean(rows, column(TEST, axis), seeds),
        found,
        found.p,
        area,
        nan if area is None else area.p,
    )


def _corrected(standings: list[Standing]) -> list[Standing]:
    """The same with p-values corrected for the number of methods; the baseline's do not count."""
    first, *others = standings
    best = holm([each.best.p for each in others])
    # The baseline's interpolations are its frontier.
    apart = [not each.method.endswith(INTERPOLATED) for each in others]
    equal = holm([e.equal.p if own else nan for e, own in zip(others, apart, strict=True)])
    area = holm([e.equal.area_p if own else nan for e, own in zip(others, apart, strict=True)])
    return [
        first,
        *(
            replace(
                each,
                best=replace(each.best, p=b),
                equal=replace(each.equal, p=e, area_p=a),
            )
            for each, b, e, a in zip(others, best, equal, area, strict=True)
        ),
    ]


def _cost(
    comparison: Comparison,
    name: str,
    points: Points,
    base: Points,
    seeds: Sequence[int],
    curves: Sequence[Row],
) -> Cost:
    rows, base_rows = points[_best(points)], base[_best(base)]
    memory = [rows[seed]["memory"] for seed in seeds] + [base_rows[s]["memory"] for s in seeds]
    known = all(memory) and min(memory) > 0
    base_trains, trains = trained_by(comparison, comparison.baseline), trained_by(comparison, name)
    targets = _ends(curves, base_trains, _best(base), seeds)
    reached = []
    for seed, target in zip(seeds, targets, strict=True):
        curve = _of(curves, trains, _best(points), seed)
        reached += [row for row in curve if row["loss"] <= target][:1]

    def relative(what: str) -> float:
        # The same runs cost the same, also where some were trained again for rows added later.
        is_same = trains == base_trains
        return 1.0 if is_same else _mean(rows, what, seeds) / _mean(base_rows, what, seeds)

    return Cost(
        relative("step_seconds"),
        relative("memory") if known else None,
        _mean(rows, "perturbation", seeds),
        fmean(row["step"] for row in reached) if reached else None,
        fmean(row["seconds"] for row in reached) if reached else None,
        None if any(map(isnan, targets)) else len(reached),
    )


def _of(curves: Iterable[Row], method: str, point: Point, seed: int) -> list[Row]:
    """The curve of a run, in order; of a method after another one, that of its run."""
    return [
        row
        for row in curves
        if (row["method"], row["learning_rate"], row["seed"]) == (method, point.learning_rate, seed)
        and row["setting"] in (point.setting, "")
    ]


def _ends(curves: Sequence[Row], method: str, point: Point, seeds: Sequence[int]) -> list[float]:
    """The last validation loss of each seed; NaN where its curve is not known."""
    found = [_of(curves, method, point, seed) for seed in seeds]
    return [curve[-1]["loss"] if curve else nan for curve in found]


def _curve(
    curves: Sequence[Row], comparison: Comparison, name: str, point: Point, points: Points
) -> list[tuple[int, list[float]]]:
    if trained_by(comparison, name) != name:
        return []
    by_step: dict[int, list[float]] = {}
    for seed in points[point]:
        for row in _of(curves, name, point, seed):
            by_step.setdefault(row["step"], []).append(row["loss"])
    return sorted(by_step.items())
