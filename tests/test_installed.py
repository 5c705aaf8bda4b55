"""Installed without the repository: package, presets and commands, from a wheel alone."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# It ends as the script that pip writes for the command does.
PROGRAM = """
import sys
import spectral_ds
from spectral_ds.cli import main
from spectral_ds.config import PRESETS
assert "{folder}" in spectral_ds.__file__, spectral_ds.__file__
assert "retain" in PRESETS
for preset in PRESETS:
    spectral_ds.load_config({{"preset": preset}})
sys.exit(main())
"""


@pytest.fixture(scope="module")
def installed(processes, tmp_path_factory):
    """A folder with what the wheel holds, and an environment in which Python finds it first."""
    built, folder = (tmp_path_factory.mktemp(name) for name in ("built", "site"))
    source = tmp_path_factory.mktemp("source")
    for name in ("spectral_ds", "pyproject.toml", "README.md", "LICENSE"):  # no build left behind
        os.symlink(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
               "--quiet", "--wheel-dir", str(built), str(source)]  # fmt: skip
    # A compiler would be an error.
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    [wheel] = built.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder, {**os.environ, "PYTHONPATH": str(folder)}


def test_the_package_its_presets_and_its_command_are_in_the_wheel(installed, tmp_path):
    folder, environment = installed
    [points] = folder.glob("*.dist-info/entry_points.txt")
    assert "spectral-ds = spectral_ds.cli:main" in points.read_text("utf-8")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(folder=folder), "env", "--json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versions"]["torch"]


def test_nothing_else_is(installed):
    folder, _ = installed
    assert {path.name for path in folder.iterdir() if path.suffix != ".dist-info"} == {
        "spectral_ds"
    }
