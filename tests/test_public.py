"""The interface that holds: what others may build on, listed in one place.

A name that goes or changes breaks a test here; the change belongs into `.github/CHANGELOG.md`, and
what it replaces into a warning.
"""

import inspect
import re
from pathlib import Path

import pytest
import torch

import spectral_ds
from spectral_ds.cli import make_parser
from spectral_ds.config import PRESETS

ROOT = Path(__file__).parents[1]
# Of functions, their parameters in order.
FUNCTIONS = {
    "attach": ["model_or_engine", "optimizer", "config", "writer"],
    "initialize": ["args", "kwargs"],
    "load_config": ["source"],
    "plugin_of": ["engine_or_model"],
}
CLASSES = {
    "ParameterGraph": ["num_nodes", "num_edges", "describe", "laplacian"],
    "SpectralCallback": ["on_train_begin"],
    "SpectralConfig": ["digest"],
    "SpectralConfigError": [],
    "SpectralPlugin": [
        "band_energies", "calibrate", "config", "density", "detach", "eigenpairs", "engine",
        "filter_gradients", "graph", "load", "load_state_dict", "metrics", "monitor",
        "observe_loss", "save", "save_activations", "snr", "stack", "state_dict",
    ],
    "UnsupportedEngineError": [],
}  # fmt: skip
# Set on instances.
ATTRIBUTES = {"config", "engine", "monitor", "stack", "num_nodes", "num_edges"}
COMMANDS = ("inspect", "plan", "merge", "compare", "add", "check", "env")


def test_the_package_exports_these_names_and_no_other():
    assert sorted(spectral_ds.__all__) == sorted([*FUNCTIONS, *CLASSES])
    for name in spectral_ds.__all__:
        assert inspect.getdoc(getattr(spectral_ds, name))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_these_parameters(name):
    assert list(inspect.signature(getattr(spectral_ds, name)).parameters) == FUNCTIONS[name]


@pytest.fixture(scope="module")
def instances():
    """Of the classes with attributes, by name."""
    model = torch.nn.Linear(3, 2)
    plugin = spectral_ds.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), {})
    yield {"SpectralPlugin": plugin, "ParameterGraph": plugin.graph}
    plugin.detach()


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_has_these_members(name, instances):
    found = getattr(spectral_ds, name)
    for member in CLASSES[name]:
        if member in ATTRIBUTES:
            assert type(instances[name]) is found
            assert hasattr(instances[name], member), member
        else:
            assert inspect.getdoc(getattr(found, member))


def test_these_commands_and_presets_are_there():
    usage = make_parser().format_help()
    assert re.findall(r"^    (\w+) +\S", usage, re.MULTILINE) == list(COMMANDS)
    assert sorted(PRESETS) == [
        "anchor_lm", "denoise", "gradient_smoothing", "grokfast", "laplacian_smoothing", "observe",
        "paper", "retain", "retain_lm", "whiten",
    ]  # fmt: skip


def test_the_changelog_tells_of_this_version():
    text = (ROOT / ".github/CHANGELOG.md").read_text("utf-8")
    assert f"## {spectral_ds.__version__}" in text
