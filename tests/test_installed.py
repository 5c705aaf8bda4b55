"""Installed without the repository: package, presets and commands, from a wheel alone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import spectral_ds, pathlib
from spectral_ds.config import PRESETS
assert "{folder}" in spectral_ds.__file__, spectral_ds.__file__
for preset in PRESETS:
    spectral_ds.load_config({{"preset": preset}})
print(sorted(PRESETS))
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


def run(installed, folder, *words):
    _, environment = installed
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_the_package_and_its_presets_are_in_the_wheel(installed, tmp_path):
    folder, _ = installed
    done = run(installed, tmp_path, "-c", PROGRAM.format(folder=folder))
    assert done.returncode == 0, done.stderr
    assert "retain" in done.stdout


def test_nothing_else_is(installed):
    folder, _ = installed
    assert {path.name for path in folder.iterdir() if path.suffix != ".dist-info"} == {
        "spectral_ds"
    }


def test_the_command_of_the_wheel_runs(installed, tmp_path):
    """As the script that pip writes for it does."""
    folder, _ = installed
    [points] = folder.glob("*.dist-info/entry_points.txt")
    assert "spectral-ds = spectral_ds.cli:main" in points.read_text("utf-8")
    main = "import sys; from spectral_ds.cli import main; sys.exit(main())"
    done = run(installed, tmp_path, "-c", main, "env", "--json")
    assert done.returncode == 0, done.stderr
    assert '"missing"' in done.stdout
