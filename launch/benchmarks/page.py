"""Makes one page of what `launch/gpu.sh` has found.

In:  the folder: of each part NAME.status (exit status, seconds, command), NAME.log and, of
     benchmarks, NAME.json.
Out: report.md and report.json there; the page on the terminal. Exits with 1 if a part failed.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from sheet import as_markdown, table

# Lines of a log that are shown of a part that failed.
TAIL = 15
TIMED_OUT = (124, 137)


def part_of(path: Path) -> dict[str, Any]:
    """What is known of one part."""
    status, seconds, command = path.read_text("utf-8").strip().split(" ", 2)
    log = path.with_suffix(".log").read_text("utf-8", errors="replace")
    found: dict[str, Any] = {
        "part": path.stem,
        "status": int(status),
        "seconds": int(seconds),
        "command": command,
        "end": log.splitlines()[-TAIL:],
    }
    result = path.with_suffix(".json")
    if result.exists():
        found["sheet"] = json.loads(result.read_text("utf-8"))
    elif path.stem == "environment" and "{" in log:
        found["environment"], _ = json.JSONDecoder().raw_decode(log[log.index("{") :])
    return found


def outcome(part: dict[str, Any]) -> str:
    """In a few words."""
    if part["status"] in TIMED_OUT:
        return "not done in time"
    if part["part"] == "cells":
        counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", "\n".join(part["end"]))
        return ", ".join(dict.fromkeys(counts)) or f"status {part['status']}"
    return "done" if part["status"] == 0 else f"failed with status {part['status']}"


def page_of(parts: list[dict[str, Any]]) -> str:
    """The page."""
    rows = [
        {"part": part["part"], "outcome": outcome(part), "seconds": part["seconds"],
         "command": f"`{part['command']}`"} for part in parts
    ]  # fmt: skip
    lines = ["# On this machine", "", *table(rows), ""]
    for part in parts:
        if part["status"]:
            lines += [f"### {part['part']}: the end of its log", "", "```", *part["end"], "```", ""]
        if "sheet" in part:
            lines += [as_markdown(part["sheet"])]
    return "\n".join(lines)


def main() -> None:
    """Reads the folder, writes the page."""
    folder = Path(sys.argv[1])
    in_order = sorted(folder.glob("*.status"), key=lambda path: path.stat().st_mtime)
    parts = [part_of(path) for path in in_order]
    page = page_of(parts)
    (folder / "report.md").write_text(page, "utf-8")
    (folder / "report.json").write_text(json.dumps(parts, indent=2, ensure_ascii=False), "utf-8")
    print(page)
    sys.exit(any(part["status"] for part in parts))


if __name__ == "__main__":
    main()
