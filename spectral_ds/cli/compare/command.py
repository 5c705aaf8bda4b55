"""`spectral-ds compare`: methods × learning rates × seeds × tasks, with honest statistics."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectral_ds.cli.arguments import add_command, at_least
from spectral_ds.cli.errors import UserError

if TYPE_CHECKING:
    from spectral_ds.cli.compare.settings import Comparison

EXAMPLES = """examples:
  spectral-ds compare --config mine.yaml --out runs/mine
  spectral-ds compare --config mine.yaml --out runs/mine seeds=[0,1,2] model=./my-model
  spectral-ds compare --config mine.yaml --out runs/mine --resume
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(
        commands,
        "compare",
        run,
        summary="does it help? methods of training side by side, on your model and texts",
        description="Trains a model by several methods, learning rates and seeds. Chooses\n"
        "on validation data, reports on test data, and says how certain it is that one is better,\n"
        "at its best and at equal forgetting. Started again with --resume, it goes on.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", type=Path, required=True, help="YAML file")
    add("--out", metavar="DIR", type=Path, required=True, help="for all results")
    add("--resume", action="store_true", help="go on with what is in DIR")
    add("--report", action="store_true", help="train nothing: report on what is in DIR")
    add("--quick", action="store_true", help="with the keys under `quick` in the file")
    add("--device", metavar="NAME", default="cpu", help="cpu (default) or cuda")
    number: dict[str, Any] = {"type": at_least(1), "metavar": "N"}
    add("--workers", type=at_least(0), metavar="N",
        help="runs at once (default: cores / threads; 1 on cuda); 0: in this process")  # fmt: skip
    add("--threads", default=1, help="of each (default: 1)", **number)
    add("overrides", metavar="KEY=VALUE", nargs="*", help="win over the file")


def run(arguments: argparse.Namespace) -> int:
    """Compare.

    Returns:
        1 if a run failed, else 0.

    Raises:
        UserError: an argument or the configuration cannot be used.
    """
    from spectral_ds.cli.compare.settings import chosen, load
    from spectral_ds.cli.compare.state import State, contents_of

    if arguments.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed says that it looks for others
    comparison, content = load(arguments.config, arguments.overrides, arguments.quick)
    goes_on = arguments.resume or arguments.report
    # Methods that are not asked for have no results, and may change.
    written = {**content, "methods": {n: content["methods"][n] for n in chosen(comparison)}}
    writes = not arguments.report  # beside a comparison that runs, its rows would be lost
    state = State(arguments.out)
    with state.begun(written, contents_of(comparison), goes_on, writes):
        return _compared(comparison, arguments, writes)


def _compared(comparison: "Comparison", arguments: argparse.Namespace, writes: bool) -> int:
    from spectral_ds.cli.compare.job import CURVES, RESULTS, Workplace
    from spectral_ds.cli.compare.jobs import jobs_of
    from spectral_ds.cli.compare.material import Material
    from spectral_ds.cli.compare.pool import run_jobs
    from spectral_ds.cli.compare.prepare import prepare
    from spectral_ds.cli.compare.report import write
    from spectral_ds.cli.compare.results import COST, CURVE, KEY, Table, measures_of
    from spectral_ds.console import progress

    out: Path = arguments.out
    results = Table(out / "results.csv", [*KEY, *COST, *measures_of(comparison)], KEY, writes)
    curves = Table(out / "curves.csv", CURVE, (*KEY[:-1], "step"), writes)
    failures = []
    if writes:
        prepared = prepare(comparison, out, num_classes=2)
        by_seed = comparison.held_out == "by_seed"
        for seed in comparison.seeds if by_seed else comparison.seeds[:1]:
            material = Material(comparison, prepared.tokenizer(), seed)
            for task in comparison.tasks:
                material.task(task)  # what cannot be used is told before anything is trained
        jobs = jobs_of(comparison, results)
        place = Workplace(comparison, prepared, out, arguments.device, arguments.threads)
        workers = _workers(arguments)
        with progress("comparing", sum(job.rows for job in jobs), "model", True) as update:

            def take(table: str, rows: list[dict[str, Any]]) -> None:
                {RESULTS: results, CURVES: curves}[table].add(rows)
                if table == RESULTS:
                    update(len(rows))

            failures = run_jobs(jobs, place, workers, take)
    if arguments.report and not any(
        row["method"] == comparison.baseline and row["task"] in comparison.tasks
        for row in results.rows
    ):
        raise UserError(
            f"--report: {results.path} has no row of baseline = {comparison.baseline} "
            f"on {', '.join(comparison.tasks)}"
        )
    if results.rows:
        print(
            write(
                comparison, results.rows, curves.rows, out, " ".join(("spectral-ds", *sys.argv[1:]))
            )
        )
        print(f"report: {out / 'report.md'}")
    for failure in failures:
        print(f"spectral-ds: {failure.job.run.folder} failed: {failure.reason}")
    return 1 if failures else 0


def _workers(arguments: argparse.Namespace) -> int:
    if arguments.workers is not None:
        return int(arguments.workers)
    if arguments.device != "cpu":
        return 1
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, cores // int(arguments.threads))
