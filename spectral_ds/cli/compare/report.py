"""The report: tables, figures, a verdict in words, and what is needed to run it again."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from math import isnan
from pathlib import Path
from typing import Any
from urllib.parse import quote

from spectral_ds.cli.compare.analysis import analyse
from spectral_ds.cli.compare.figures import curves_file, draw, frontier_file
from spectral_ds.cli.compare.inference import Difference
from spectral_ds.cli.compare.material import DIVERGENCE, FORGETTING
from spectral_ds.cli.compare.results import Row
from spectral_ds.cli.compare.settings import Comparison
from spectral_ds.cli.compare.standing import Standing, TaskAnalysis

# Below it a difference is called one.
SIGNIFICANT = 0.05
PACKAGES = ("spectral-ds", "torch", "transformers", "numpy", "scipy")
# What counts as forgetting, by kind; the first is the one that is told first.
AXES = {
    "classification": {FORGETTING: "share of nearest neighbours of general texts that are lost"},
    "causal-lm": {
        FORGETTING: "growth of the loss on general texts (nats)",
        DIVERGENCE: "divergence on general texts from the model before (nats)",
    },
}


def write(
    comparison: Comparison, rows: Sequence[Row], curves: Sequence[Row], out: Path, command: str
) -> str:
    """Write report.md and its figures; the verdict, for people."""
    axes = AXES[comparison.kind]
    analyses = [
        found
        for task in comparison.tasks
        for axis in axes
        if (found := analyse(comparison, task, rows, curves, axis))
    ]
    examples = {
        name: task.per_class or task.examples
        for name, task in comparison.tasks.items()
        if task.per_class or task.examples
    }
    figures = draw(analyses, comparison.drawn, examples, axes, out)
    verdict = [line for each in analyses for line in verdict_of(each, comparison)]
    parts = ["# Comparison", "", "## Verdict", "", *(f"- {line}" for line in verdict), ""]
    for each in analyses:
        parts += _section(each, comparison)
    if out / "examples.png" in figures:
        parts += ["## Few examples", "", "![Loss and accuracy against examples](examples.png)", ""]
    parts += _again(comparison, command)
    (out / "report.md").write_text("\n".join(parts), encoding="utf-8")
    return "\n".join(verdict)


def verdict_of(analysis: TaskAnalysis, comparison: Comparison) -> list[str]:
    """In words: which methods differ, and by how much."""
    first, *others = analysis.standings
    fewest = min((each.seeds for each in others), default=first.seeds)
    lines = []
    claims = [(f"at equal {analysis.axis}", [(s, s.equal.difference, s.equal.p) for s in others])]
    if analysis.axis == FORGETTING:
        lines.append(
            f"{analysis.task}: {comparison.baseline} at its best has a test loss of "
            f"{first.best.loss:.3f} and a forgetting of {first.best.forgetting:.3f}; {fewest} to "
            f"{first.seeds} seeds"
        )
        best = [(s, s.best.loss_difference, s.best.p) for s in others]
        claims.insert(0, ("at its best", best))
    for title, differences in claims:
        for word, sign in (("lower", -1), ("higher", 1)):
            found = [
                f"{s.method} by {abs(d.mean):.3f} [{_interval(d, sign)}], p = {p:.2g}"
                for s, d, p in differences
                if p < SIGNIFICANT and d.mean * sign > 0
            ]
            listed = "; ".join(found) or "none shown"
            lines.append(f"{analysis.task}, loss {word} {title}: {listed}")
    return lines


def _section(analysis: TaskAnalysis, comparison: Comparison) -> list[str]:
    task = comparison.tasks[analysis.task]
    head = f"{task.steps} steps of {comparison.batch_size}"
    base = comparison.baseline
    if analysis.axis != FORGETTING:
        return _equal_section(analysis, comparison)
    return [
        f"## {analysis.task}",
        "",
        f"{head}. p: Holm over the methods of a table. Intervals: 95 % bootstrap.",
        "",
        f"**At its best** (where its validation loss is least), against {base}:",
        "",
        *_table(_best_row, analysis.standings, comparison),
        "",
        f"**Cost** at its best; × is relative to {base}; steps and seconds of training "
        f"to the validation loss that {base} ends with, and how many seeds reach it:",
        "",
        *_table(_cost_row, analysis.standings, comparison),
        "",
        "*Times compare runs of one call on a machine that does nothing else; of runs that were "
        "added later, or side by side with others, they tell little.*",
        "",
        f"![Learning curves]({quote(curves_file(analysis))})",
        "",
        *_equal_section(analysis, comparison),
    ]


def _equal_section(analysis: TaskAnalysis, comparison: Comparison) -> list[str]:
    base, what = comparison.baseline, AXES[comparison.kind][analysis.axis]
    return [
        f"**At equal {analysis.axis}** ({what}): loss above the frontier of {base} and its "
        "interpolations, where validation says that it is least; and between the two frontiers, "
        "on average:",
        "",
        *_table(_equal_row, analysis.standings, comparison),
        "",
        f"![Frontiers]({quote(frontier_file(analysis))})",
        "",
        "*Means over seeds and their standard errors, of the points that validation data put on "
        "a frontier.*",
        "",
    ]


def _table(make_row: Any, standings: Sequence[Standing], comparison: Comparison) -> list[str]:
    rows = [make_row(each, comparison) for each in standings]
    names = list(rows[0])
    return [
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(names)}",
        *(f"| {' | '.join(row[name] for name in names)} |" for row in rows),
    ]


def _best_row(standing: Standing, comparison: Comparison) -> dict[str, str]:
    best = standing.best
    row = {
        "method": standing.method,
        "seeds": str(standing.seeds),
        "chosen": str(best.point),
        "test loss": f"{best.loss:.4f}",
        "difference": _difference(best.loss_difference, standing, comparison),
        "p": _p(best.p, standing, comparison),
    }
    if best.accuracy is not None and best.accuracy_difference is not None:
        row["accuracy"] = f"{100 * best.accuracy:.1f} %"
        row["points"] = _difference(best.accuracy_difference, standing, comparison, 100, 1)
    return row | {"forgetting": f"{best.forgetting:.3f}"}


def _equal_row(standing: Standing, comparison: Comparison) -> dict[str, str]:
    equal = standing.equal
    return {
        "method": standing.method,
        "chosen": str(equal.point),
        "forgetting": f"{equal.forgetting:.3f}",
        "test loss": f"{equal.loss:.4f}",
        "above the frontier": _difference(equal.difference, standing, comparison),
        "p": _p(equal.p, standing, comparison),
        "between frontiers": "–"
        if equal.area is None
        else _difference(equal.area, standing, comparison),
        "p of it": _p(equal.area_p, standing, comparison),
    }


def _cost_row(standing: Standing, comparison: Comparison) -> dict[str, str]:
    cost = standing.cost
    steps = "–" if cost.steps_to is None else f"{cost.steps_to:.0f}"
    return {
        "method": standing.method,
        "step": f"{cost.step:.2f} ×",
        "memory": "–" if cost.memory is None else f"{cost.memory:.2f} ×",
        "‖W − W₀‖": f"{cost.perturbation:.2f}",
        "steps to": steps,
        "seconds to": "–" if cost.seconds_to is None else f"{cost.seconds_to:.0f}",
        "reached": "–" if cost.reached is None else f"{cost.reached} of {standing.seeds}",
    }


def _difference(
    difference: Difference,
    standing: Standing,
    comparison: Comparison,
    times: float = 1,
    digits: int = 4,
) -> str:
    if standing.method == comparison.baseline:
        return "–"
    low, high = times * difference.low, times * difference.high
    interval = "" if isnan(low) else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{times * difference.mean:+.{digits}f}{interval}"


def _interval(difference: Difference, sign: int) -> str:
    ends = sorted((sign * difference.low, sign * difference.high))
    return ", ".join("–" if isnan(end) else f"{end:.3f}" for end in ends)


def _p(p: float, standing: Standing, comparison: Comparison) -> str:
    return "–" if isnan(p) or standing.method == comparison.baseline else f"{p:.2g}"


def _again(comparison: Comparison, command: str) -> list[str]:
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    drawn = {"same": "the same for all seeds", "by_seed": "drawn anew by each seed"}[
        comparison.held_out
    ]
    return [
        "## How it was made",
        "",
        f"`{command}` with Python {platform.python_version()}, {packages}, on "
        f"{platform.machine()}. All settings are in `comparison.json`, all figures of every run in "
        "`results.csv` and `curves.csv`.",
        "",
        f"Learning rates {_listed(comparison.learning_rates)}, and of seeds "
        f"{_listed(comparison.seeds)} those that were run: the tables say of each method how many. "
        f"Held out of each task: {comparison.validation} examples to choose by, {comparison.test} "
        f"to report, {drawn}. What is chosen is chosen by means over seeds on validation data.",
        "",
    ]


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(json.dumps(value) for value in values)
