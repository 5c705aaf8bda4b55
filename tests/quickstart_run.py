"""The quickstart on a tiny model: in, a folder of `corpus`; out, its `runs` and what it printed."""

import os
import subprocess
from pathlib import Path

from launching import NOT_COMPILED

SCRIPT = Path(__file__).parent.parent / "launch" / "quickstart.sh"
STEPS, HELD_OUT = 6, 64
TIMEOUT_SECONDS = 600


def run_quickstart(folder: Path) -> str:
    """What the quickstart printed; its results are in `runs`."""
    command = ["bash", SCRIPT]
    command += ["--steps", STEPS, "--tokens", 16, "--out", folder / "runs"]
    command += ["--model", folder / "model", "--task", "classification"]
    command += ["--data", folder / "reviews.tsv", "--general", folder / "other.txt"]
    command += ["--held-out", HELD_OUT]
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        stdin=subprocess.DEVNULL,
        env=os.environ | NOT_COMPILED,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
