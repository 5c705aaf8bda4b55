"""The comparisons that the project ships load, and `launch/compare.sh` knows their variables."""

import re
import subprocess
from pathlib import Path

import pytest

from spectral_ds.cli.compare.jobs import runs_of
from spectral_ds.cli.compare.settings import load

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs" / "compare").glob("*.yaml"))
SCRIPT = ROOT / "launch" / "compare.sh"


def variables_of(path):
    """All that a file and what it extends take from the environment."""
    text = path.read_text()
    found = set(re.findall(r"oc\.env:(\w+)", text))
    for other in re.findall(r"^extends: (.+)$", text, re.MULTILINE):
        found |= variables_of(path.parent / other)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("quick", [False, True], ids=["whole", "quick"])
def test_every_comparison_loads_and_asks_for_runs(path, quick, monkeypatch):
    for name in variables_of(path):
        monkeypatch.setenv(name, name)
    comparison, written = load(path, [], quick)
    runs = runs_of(comparison)
    assert runs
    assert {run.method for run in runs} <= set(comparison.methods)
    assert comparison.baseline in {run.method for run in runs}
    if quick:
        assert comparison.tasks.keys() == load(path, [], False)[0].tasks.keys()
    assert "${oc.env:" in written["model"]  # no path of this machine goes into results


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_script_sets_what_they_take(path):
    script = SCRIPT.read_text()
    assert all(re.search(rf"export .*\b{name}\b", script) for name in variables_of(path))
    assert f"#      {path.stem} " in script


def test_the_script_refuses_what_is_no_comparison(processes):
    done = subprocess.run(["bash", SCRIPT, "none"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "bash launch/compare.sh NAME" in done.stderr
