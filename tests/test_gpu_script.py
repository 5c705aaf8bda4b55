"""launch/gpu.sh as a user runs it; its parts are played by a Python that does not measure."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("processes")
ROOT = Path(__file__).parent.parent

PLAYED = """#!/usr/bin/env bash
case "$*" in
    *device_count*) echo "$DEVICES"; exit ;;
    *page.py*) exec "$REAL" "$@" ;;
    *"step.py --engine zero2"*) echo "out of memory"; exit 3 ;;
    *"step.py --engine zero3"*) if [[ -n ${SLOW:-} ]]; then echo $$ >"$SLOW"; sleep 60; fi ;;
esac
echo '{"played": true}'
"""


def hear():
    """Ctrl-C, which what a shell starts in the background ignores, and so does all below it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path):
    """Starts the script; its folder has files of others."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PLAYED)
    python.chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.json").write_text("{}")
    (out / "report.md").write_text("an earlier one")

    def run(*words, devices=1, slow=""):
        given = {"SPECTRAL_DS_VENV": str(python.parent.parent), "REAL": sys.executable}
        environment = {**os.environ, **given, "DEVICES": str(devices), "SLOW": slow}
        command = ["bash", ROOT / "launch" / "gpu.sh", "--out", out, *words]
        pipe = subprocess.PIPE
        return out, subprocess.Popen(
            command, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear
        )

    return run


@pytest.mark.parametrize(
    ("words", "devices", "device"), [((), 1, "cuda"), (("--device", "cpu"), 0, "cpu")]
)
def test_a_part_that_fails_does_not_stop_the_others_and_others_files_stay(
    start, words, devices, device
):
    out, process = start(*words, devices=devices)
    page, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (1, "")
    parts = {part["part"]: part for part in json.loads((out / "report.json").read_text())}
    failed = [name for name, part in parts.items() if part["status"]]
    assert failed == ["step-zero2"]
    assert parts["step-zero2"]["end"] == ["out of memory"]
    assert parts["environment"]["environment"] == {"played": True}
    steps = {f"step-{engine}" for engine in ("plain", "zero2", "zero3", "fsdp2")}
    assert {"cells", "filter-smollm2", "scaling", *steps} <= parts.keys()
    for name in ("filter-smollm2", "scaling", *steps):
        assert f" --device {device} " in parts[name]["command"]
    assert (out / "report.md").read_text() in page
    assert (out / "mine.json").read_text() == "{}"


def test_without_a_device_nothing_is_lost(start):
    out, process = start(devices=0)
    assert "torch sees no CUDA device" in process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert (out / "report.md").read_text() == "an earlier one"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_script_and_the_part_that_runs(start, tmp_path, sent):
    running = tmp_path / "running"
    _, process = start(slow=str(running))
    until = time.monotonic() + 60
    while not (running.exists() and running.read_text().strip()):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(sent)
    process.communicate(timeout=30)
    assert process.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(running.read_text()), 0)
