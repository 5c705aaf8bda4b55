"""Sheet: tables of one benchmark, as Markdown for people and as JSON for programs."""

import datetime
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spectral_ds.cli.packages import installed_version

PACKAGES = ("torch", "deepspeed", "transformers", "triton", "torch-sparse", "spectral-ds")


class Sheet:
    """What a benchmark has measured, and on what.

    Args:
        name: of the benchmark.
        device: on which.
        settings: for people.
    """

    def __init__(self, name: str, device: torch.device, settings: str) -> None:
        self._found: dict[str, Any] = {
            "benchmark": name,
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(device),
            "settings": settings,
            "tables": {},
        }

    def add(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table, whose rows have the same keys; floats are shown with 4 digits."""
        self._found["tables"][title] = [dict(row) for row in rows]

    def close(self, path: Path | None) -> None:
        """Print the sheet, and write it where one asks for it."""
        print(as_markdown(self._found))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self._found, indent=2, ensure_ascii=False), "utf-8")


def as_markdown(sheet: Mapping[str, Any]) -> str:
    """A sheet for people; `sheet` is what `Sheet.close` writes."""
    lines = [
        f"### {sheet['benchmark']}",
        "",
        f"`{sheet['command']}`, {sheet['date'][:10]}: {sheet['settings']}, on "
        f"{sheet['machine']['device']}, {versions(sheet['machine'])}.",
    ]
    for title, rows in sheet["tables"].items():
        lines += ["", f"**{title}**", "", *table(rows)]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    if not rows:
        return ["nothing"]
    names = list(rows[0])
    return [
        f"| {' | '.join(names)} |",
        "|" + "---|" * len(names),
        *(f"| {' | '.join(_text(row[name]) for name in names)} |" for row in rows),
    ]


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def machine(device: torch.device) -> dict[str, Any]:
    """What is there."""
    found: dict[str, Any] = {"python": platform.python_version()}
    found |= {name: v for name in PACKAGES if (v := installed_version(name)) is not None}
    if device.type != "cuda":
        return {"device": f"{torch.get_num_threads()} CPU threads", **found}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": f"{torch.cuda.device_count()} × {properties.name}",
        "memory": properties.total_memory,
        "cuda": torch.version.cuda,
        **found,
    }


def versions(found: Mapping[str, Any]) -> str:
    """Of what is there, for people."""
    named = {k: v for k, v in found.items() if k not in ("device", "memory")}
    return ", ".join(f"{name} {version}" for name, version in named.items())


def spread(ratio: tuple[float, float, float] | None) -> str | None:
    """A ratio with the middle 80 % of what it was."""
    if ratio is None:
        return None
    middle, low, high = ratio
    return f"{middle:.3g} ({low:.3g}–{high:.3g})"
