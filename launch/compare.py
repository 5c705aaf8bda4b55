"""Puts a run without spectral_ds and one with it side by side.

In:  DIR/baseline/summary.json and DIR/spectral/summary.json, written by finetune.py.
Out: a table on standard output and DIR/summary.json with both under "baseline" and "spectral".

    python launch/compare.py DIR
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

# label, key, number format
ROWS = [
    ("loss, last step", "final_loss", "{:.4f}"),
    ("loss, held out, before", "evaluation_loss_before", "{:.4f}"),
    ("loss, held out, after", "evaluation_loss", "{:.4f}"),
    ("perturbation ‖θ − θ_ref‖", "perturbation", "{:.4f}"),
    ("step time, median (s)", "step_seconds", "{:.3f}"),
    ("filter time (s)", "filter_seconds", "{:.3f}"),
    ("boundary bytes a step", "boundary_bytes", "{:,.0f}"),
    ("nodes of the graph", "nodes", "{:,.0f}"),
    ("edges of the graph", "edges", "{:,.0f}"),
]


def load(folder: Path) -> dict[str, Any]:
    """The summary of one run."""
    path = folder / "summary.json"
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"compare: {path} is missing: the run did not finish") from None
    return summary


def table(baseline: dict[str, Any], spectral: dict[str, Any]) -> str:
    """The figures of both runs, one a line, with the relative change where both have it."""
    lines: list[tuple[str, ...]] = [("", "without", "with", "change")]
    for label, key, form in ROWS:
        before, after = baseline.get(key), spectral.get(key)
        if before is None and after is None:
            continue
        cells = ["-" if value is None else form.format(value) for value in (before, after)]
        change = f"{100 * (after / before - 1):+.1f} %" if before and after is not None else ""
        lines.append((label, *cells, change))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    text = []
    for label, *cells in lines:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text.append("  ".join([label.ljust(widths[0]), *right]).rstrip())
    text.insert(1, "-" * (sum(widths) + 6))
    return "\n".join(text)


def main() -> None:
    """Prints the table and writes the summary of both runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    both = {name: load(directory / name) for name in ("baseline", "spectral")}
    alike = [(len(run["losses"]), run["world_size"], run["zero_stage"]) for run in both.values()]
    if alike[0] != alike[1]:
        raise SystemExit(f"compare: steps, world size, ZeRO stage differ: {alike[0]}, {alike[1]}")
    print(f"{alike[0][0]} steps, {alike[0][1]} ranks, ZeRO stage {alike[0][2]}\n")
    print(table(**both))
    target = directory / "summary.json"
    target.write_text(json.dumps(both, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
