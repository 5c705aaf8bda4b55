"""Files that were damaged, wherever that is: an error that names them, and nothing is changed.

Damages of a manifest and its files one by one are in test_checkpoints_refused, on all ranks.
"""

import shutil

import pytest
import torch
from activations import RATE, CalledByIds, random_ids, section_of
from any_model import quick
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import spectral_ds
from spectral_ds.checkpoint import CheckpointError
from spectral_ds.cli.examples import load_corpus
from spectral_ds.config import SpectralConfigError
from spectral_ds.text import DataError

KINDS = ("cut", "flipped", "emptied", "of another type")
# One file is damaged again and again; that the folder is the same for all examples is meant.
many = settings(quick, suppress_health_check=[HealthCheck.function_scoped_fixture])


def damaged(content, kind, place):
    """A file's content after an accident at a place in [0, 1)."""
    at = int(place * len(content))
    if kind == "flipped":
        return content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]
    return {"cut": content[:at], "emptied": b"", "of another type": b"PK\x03\x04" + content}[kind]


DAMAGES = st.sampled_from(KINDS), st.floats(0, 1, exclude_max=True)


def attached(section):
    """The plugin, and the model and the optimizer that it is attached to."""
    model = CalledByIds()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    return spectral_ds.attach(model, optimizer, section), model, optimizer


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    path = tmp_path_factory.mktemp("statistics") / "keep.safetensors"
    plugin, *_ = attached(section_of({"rank": 2}))
    plugin.save_activations(path)
    plugin.detach()
    return path


@many
@given(*DAMAGES)
def test_damaged_statistics_are_refused_before_anything_is_attached(statistics, kind, place):
    path = statistics.with_name("damaged.safetensors")
    path.write_bytes(damaged(statistics.read_bytes(), kind, place))
    model = CalledByIds()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    with pytest.raises(SpectralConfigError) as refused:
        spectral_ds.attach(model, optimizer, section_of({"rank": 2, "keep": str(path)}))
    assert f'spectral_ds.graph.edges[0].keep = "{path}"' in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer._optimizer_step_pre_hooks


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """A plugin, and the folder of its state two steps before."""
    folder = tmp_path_factory.mktemp("state")
    temporal = {"temporal": {"decay": 0.5, "amplify": 1.0}}
    pull = {"response": "identity", "strength": 0.1}
    section = section_of({"rank": 2}, filter=temporal, regularizer=pull)
    plugin, model, optimizer = attached(section)
    plugin.save(folder / "whole")
    saved = numbers_of(plugin)
    for step in range(2):
        optimizer.zero_grad()
        model(random_ids(4, seed=step)).backward()
        optimizer.step()
    now = numbers_of(plugin)
    moved = [name for name in now if not torch.equal(now[name], saved[name])]
    assert "numbers.step" in moved
    assert any(name.startswith("temporal.") for name in moved)
    yield plugin, folder
    plugin.detach()


@many
@given(*DAMAGES, st.integers(0, 99))
def test_a_damaged_state_is_refused_and_the_plugin_stays_as_it_is(state, kind, place, number):
    plugin, folder = state
    shutil.rmtree(folder / "damaged", ignore_errors=True)
    shutil.copytree(folder / "whole", folder / "damaged")
    files = sorted((folder / "damaged").iterdir())
    path = files[number % len(files)]
    path.write_bytes(damaged(path.read_bytes(), kind, place))
    before = numbers_of(plugin)
    with pytest.raises(CheckpointError) as refused:
        plugin.load(folder / "damaged")
    assert path.name in str(refused.value)
    after = numbers_of(plugin)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def numbers_of(plugin):
    """Its state, as it is now, by name."""
    return {name: value.clone() for name, value in plugin.state_dict().items()}


TABLE = "text\tlabel\n" + "".join(f"words of number {n}\t{n % 2}\n" for n in range(20))


@many
@given(*DAMAGES, st.sampled_from([".tsv", ".jsonl", ".txt"]))
def test_damaged_texts_are_read_or_refused(tmp_path, kind, place, suffix):
    """A letter that is another one is a text too, and so are the lines before a cut."""
    path = tmp_path / f"texts{suffix}"
    lines = [f'{{"text": "words {n}", "label": {n % 2}}}' for n in range(20)]
    whole = "\n".join(lines) if suffix == ".jsonl" else TABLE
    content = damaged(whole.encode(), kind, place)
    path.write_bytes(content)
    try:
        texts = load_corpus(path, labelled=suffix != ".txt").texts
    except DataError:  # to which the callers add the name
        texts = []
    else:
        assert texts
    if kind == "emptied":
        assert texts == []
    if kind == "cut" and suffix == ".txt":
        lines = whole.splitlines()[: content.count(b"\n")]
        assert texts[: len(lines)] == lines
