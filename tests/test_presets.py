"""Presets: what each sets, and what the user's own keys do to it."""

import operator
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from spectral_ds import config as config_module
from spectral_ds.config import (
    PRESETS,
    EdgeConfig,
    FilterConfig,
    SpectralConfigError,
    TemporalConfig,
    load_config,
    loading,
)


@pytest.mark.parametrize(
    ("preset", "families", "keys"),
    [
        ("paper", "similarity by weights", {"filter.response": "heat", "filter.strength": 0.5}),
        (
            "retain",
            "activations by weights",
            {"graph.node": "column", "monitor.interval": 20,
             "filter.response": "tikhonov", "filter.tau": 1.0, "filter.strength": 1.0,
             "filter.apply_to": "update", "filter.rest": 1.0},
        ),
        (
            "retain_lm",
            "activations by weights",
            {"graph.node": "column", "graph.exclude": (), "filter.response": "tikhonov",
             "filter.apply_to": "update", "filter.rest": 0.3},
        ),
        (
            "anchor_lm",
            "activations by weights",
            {"graph.node": "column", "graph.exclude": (), "filter.response": "identity",
             "filter.apply_to": "update", "filter.rest": 0.65, "filter.strength": 1.0,
             "regularizer.strength": 10.0, "regularizer.coupling": "decoupled"},
        ),
        (
            "denoise",
            "similarity by gradient",
            {"graph.node": "column", "graph.refresh_interval": 50, "filter.response": "wiener",
             "statistics.interval": 1, "statistics.decay": 0.98},
        ),
        (
            "gradient_smoothing",
            "depth by weights",
            {"graph.laplacian": "combinatorial", "filter.response": "window",
             "filter.alpha": 0.4, "filter.strength": 1.0, "filter.apply_to": "update"},
        ),
        (
            "laplacian_smoothing",
            "ring by weights",
            {"graph.node": "element", "graph.exclude": (), "graph.laplacian": "combinatorial",
             "filter.response": "tikhonov", "filter.tau": 1.0, "filter.strength": 1.0},
        ),
        (
            "grokfast",
            "depth by weights",
            {"graph.exclude": (), "filter.response": "identity",
             "filter.temporal": TemporalConfig(0.98, 2.0)},
        ),
        (
            "whiten",
            "similarity by gradient",
            {"graph.node": "row", "graph.refresh_interval": 50, "filter.response": "whiten",
             "filter.power": 0.5},
        ),
        ("observe", "similarity by weights", {"filter.response": "identity"}),
    ],
)  # fmt: skip
def test_preset_sets_its_keys(preset: str, families: str, keys: dict[str, object]) -> None:
    config = load_config({"preset": preset})
    assert config.preset == preset
    assert [f"{e.family} by {e.features}" for e in config.graph.edges] == [families]
    assert {key: operator.attrgetter(key)(config) for key in keys} == keys


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_itself_a_valid_section(preset: str) -> None:
    path = Path(config_module.__file__).parent / "presets" / f"{preset}.yaml"
    keys = yaml.safe_load(path.read_text())
    assert load_config({**keys, "preset": preset}) == load_config({"preset": preset})


def test_every_preset_has_a_file_and_every_file_is_a_preset() -> None:
    folder = Path(config_module.__file__).parent / "presets"
    assert {path.stem for path in folder.iterdir()} == set(PRESETS)


def test_key_the_user_wrote_wins_over_the_preset() -> None:
    config = load_config({"preset": "observe", "filter": {"response": "heat", "tau": 3.0}})
    assert (config.preset, config.filter.response, config.filter.tau) == ("observe", "heat", 3.0)


def test_edges_the_user_wrote_replace_the_list_of_the_preset() -> None:
    config = load_config({"graph": {"edges": [{"family": "depth"}]}})
    assert config.graph.edges == (EdgeConfig("depth"),)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("response", ["identity", "heat", "lowpass", "tikhonov"])
def test_every_preset_takes_another_response(preset: str, response: str) -> None:
    if (preset, response) == ("retain_lm", "lowpass"):
        with pytest.raises(SpectralConfigError, match="needs spectral_ds"):
            load_config({"preset": preset, "filter": {"response": response}})
        return
    assert load_config({"preset": preset, "filter": {"response": response}}).filter.response == (
        response
    )


def test_parameters_of_the_preset_response_are_dropped_with_the_response(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preset = {"filter": {"response": "heat", "tau": 5.0, "strength": 0.9}}
    monkeypatch.setattr(
        loading, "_read_preset", lambda name: OmegaConf.to_container(OmegaConf.create(preset))
    )
    assert load_config({"filter": {"response": "heat"}}).filter.tau == 5.0
    window = load_config({"filter": {"response": "window"}}).filter
    assert (window.tau, window.strength) == (FilterConfig.tau, 0.9)
