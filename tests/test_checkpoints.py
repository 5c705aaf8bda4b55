"""Nothing is lost: a resumed run is the run that would have happened, at any world size and engine;
it is found under the names that a wrapped model gives, too."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from cells import CELLS, Training
from changing import INPUTS, REMEMBERING, Blocks, frozen, loss_of, sgd
from checkpoints import (
    LATER,
    RATES,
    SAVED_AFTER,
    check_same_run,
    remembered,
    resume,
    resume_and_save,
    run_on,
    save_and_go_on,
    start,
    state_of,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import spectral_ds
from spectral_ds.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """`saved(name, n)`: the folder that n ranks of a cell saved into, and how they went on."""
    return remembered(ranks, tmp_path_factory, save_and_go_on)


@pytest.mark.parametrize(
    ("saver", "savers", "name", "world_size"),
    [
        ("zero2", 2, "plain", 1),
        ("zero2", 2, "zero2", 2),
        ("zero2", 2, "hsdp", 4),
        ("zero2", 2, "ddp", 2),
        ("zero3", 3, "fsdp2", 2),
        ("fsdp2", 2, "zero3", 3),
        ("hsdp", 4, "zero2", 2),
    ],
)
def test_a_resumed_run_is_the_run_that_would_have_happened(
    ranks, saved, saver, savers, name, world_size
):
    folder, uninterrupted = saved(saver, savers)
    results = ranks(world_size).run(resume, name, folder)
    check_same_run(results, uninterrupted)
    _, _, metrics = uninterrupted[0]
    for _, _, got_metrics in results:
        np.testing.assert_allclose(
            got_metrics["signal_to_noise/total"], metrics["signal_to_noise/total"], rtol=1e-2
        )
        np.testing.assert_allclose(got_metrics["regularizer"], metrics["regularizer"], rtol=1e-2)


def test_a_run_resumed_twice_on_other_engines_and_ranks_is_still_that_run(ranks, saved, tmp_path):
    folder, uninterrupted = saved("zero2", 2)
    until = SAVED_AFTER + 2
    ranks(3).run(resume_and_save, "zero3", folder, until, tmp_path)
    results = ranks(4).run(resume, "fsdp2", tmp_path, until)
    later = [(losses[2:], *rest) for losses, *rest in uninterrupted]
    check_same_run(results, later)


def test_without_the_state_the_run_would_differ(ranks, saved):
    folder, uninterrupted = saved("zero2", 2)
    bare = ranks(2).run(resume_without_state, folder)[0]
    worst = max(np.abs(bare[1][n] - w).max() for n, w in uninterrupted[0][1].items())
    assert worst > 1e-3


def resume_without_state(folder):
    training = start("zero2", folder / "weights.npz")
    training.engine.global_steps = SAVED_AFTER
    return run_on(training, SAVED_AFTER, SAVED_AFTER + LATER)


NOTHING_BUT_EDGES = {"monitor": {"enabled": False}, "graph": {"laplacian": "combinatorial"}}


def laplacian(training):
    names = [node.name for node in training.plugin.stack.graphs[0].parameters]
    return training.plugin.graph.laplacian(names).toarray()


def save_edges(name, folder):
    training = start(name, section=NOTHING_BUT_EDGES)
    training.plugin.save(folder)
    found = laplacian(training)
    training.close()
    return found


def load_edges(name, folder):
    """After a step, the weights would make another graph."""
    training = start(name, section=None)
    training.step(0)
    training.attach(NOTHING_BUT_EDGES)
    fresh = laplacian(training)
    training.plugin.load(folder)
    found = laplacian(training)
    training.close()
    return fresh, found


@pytest.mark.parametrize(
    ("name", "world_size", "other", "other_size", "files"),
    [
        ("zero3", 3, "fsdp2", 2, 3),
        ("ddp", 2, "hsdp", 4, 1),
    ],
)
def test_the_graph_is_saved_whole_also_where_there_is_nothing_else(
    ranks, tmp_path, name, world_size, other, other_size, files
):
    expected = ranks(world_size).run(save_edges, name, tmp_path)[0]
    assert len(list(tmp_path.glob("rank-*"))) == files
    for fresh, found in ranks(other_size).run(load_edges, other, tmp_path):
        assert np.abs(fresh - expected).max() > 1e-2
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_ranks_that_hold_the_same_save_one_file(saved):
    folder, _ = saved("hsdp", 4)
    assert len(list((folder / "spectral_ds").glob("rank-*"))) == 2


def test_a_step_that_is_taken_again_after_loading_is_filtered_again(tmp_path):
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plugin = spectral_ds.attach(model, optimizer, {"monitor": {"interval": 1}})

    def step():
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return plugin.metrics()["step"]

    step()
    plugin.save(tmp_path)
    assert step() == 1
    plugin.load(tmp_path)
    plugin.monitor.metrics = {"step": -1.0}
    assert step() == 1


RING = {
    "graph": {"edges": [{"family": "ring"}]},
    "operator": {"kernel": "torch_csr"},
    "filter": {"response": "wiener", "bands": 4, "temporal": {"decay": 0.5, "amplify": 1.0}},
    "statistics": {"interval": 1},
    "monitor": {"interval": 1},
}
LEARNED = {"keep": "given", "learn": "training", "samples": 4, "length": 8}
ACTIVATIONS = {
    "graph": {"node": "column", "edges": [{"family": "activations", **LEARNED}]},
    "filter": {"response": "tikhonov", "apply_to": "update"},
    "monitor": {"enabled": False},
}


def linear(section):
    """A layer and its plugin, and what takes steps with some seed."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plugin = spectral_ds.attach(model, optimizer, section)

    def train(steps, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 8, generator=generator)).square().sum().backward()
            optimizer.step()

    return model, plugin, train


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ({**RING, "filter": {"response": "heat"}, "monitor": {"enabled": False}}, RING),
        ({**RING, "filter": {**RING["filter"], "bands": 2}}, RING),
        (ACTIVATIONS, ACTIVATIONS),
    ],
)
def test_what_a_state_lacks_is_forgotten(tmp_path, saved, loaded):
    """Means that a configuration did not have, and what was counted of what is learned."""
    model, plugin, train = linear(saved)
    train(2, seed=0)
    plugin.save(tmp_path)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    found = []
    for earlier in (0, 3):
        model, plugin, train = linear(loaded)
        if loaded is ACTIVATIONS:
            plugin.calibrate([torch.ones(2, 8)])
        train(earlier, seed=1)
        model.load_state_dict(weights)
        plugin.load(tmp_path)
        if loaded is ACTIVATIONS:
            plugin.calibrate([torch.eye(8)[:3]])
        train(6, seed=2)
        state = state_of(SimpleNamespace(plugin=plugin))
        found.append({**state, "weight": model.weight.detach().numpy().copy()})
    fresh, other = found
    assert fresh.keys() == other.keys()
    for name, value in fresh.items():
        np.testing.assert_array_equal(other[name], value, err_msg=name)


class Wrapped(tiny.TinyLlama):
    """Activation checkpointing puts a prefix into the names of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.llama.model.layers:
            layer.mlp = checkpoint_wrapper(layer.mlp)


def across_wrappers(pairs, folder):
    """The graph that one cell saves and the one that another gets, with either's model wrapped."""
    found = []
    for number, (saver, loader) in enumerate(pairs):
        for models in ((Wrapped, tiny.TinyLlama), (tiny.TinyLlama, Wrapped)):
            place = folder / f"{number}-{models[0].__name__}"
            training = Training(CELLS[saver], NOTHING_BUT_EDGES, rates=RATES, model=models[0])
            is_wrapped = any("wrapped" in name for name, _ in training.module.named_parameters())
            assert is_wrapped == (models[0] is Wrapped)
            training.plugin.save(place)
            expected = laplacian(training)
            training.close()
            training = Training(CELLS[loader], None, rates=RATES, model=models[1])
            training.step(0)
            training.attach(NOTHING_BUT_EDGES)
            training.plugin.load(place)
            found.append((expected, laplacian(training)))
            training.close()
    return found


def test_names_that_wrapping_changed_are_the_same_parameters(ranks, tmp_path):
    pairs = [("zero0", "fsdp2"), ("zero2", "ddp"), ("zero3", "zero1-bf16-fp32-accumulation")]
    for found in ranks(2).run(across_wrappers, pairs, tmp_path):
        for expected, got in found:
            np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_name_may_hold_the_separator_of_the_files(tmp_path):
    def attach(value):
        model = torch.nn.Module()
        model.register_parameter("a|3", torch.nn.Parameter(torch.full((4, 3), value)))
        model.register_parameter("a", torch.nn.Parameter(torch.full((4, 3), value + 1)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        section = {
            "graph": {"edges": [{"family": "ring"}]},
            "regularizer": {"strength": 0.1},
            "monitor": {"enabled": False},
        }
        return spectral_ds.attach(model, optimizer, section)

    attach(2.0).save(tmp_path)
    plugin = attach(7.0)
    plugin.load(tmp_path)
    first, second = plugin.stack.regularizer.reference.fragments
    assert first.eq(2).all()
    assert second.eq(3).all()


def unfreezing(section, folder=None, saved=None, unfreezes=True):
    """Weights of blocks, of which one joins at step 1, after four steps or resumed after two.

    Args:
        folder: for the plugin's state after two steps.
        saved: that folder, to resume from.
        unfreezes: whether the block joins.
    """
    model = frozen(Blocks(), 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    plugin = spectral_ds.attach(model, optimizer, section)
    first = 0
    if saved is not None:
        folder, first = saved, 2
        state = torch.load(folder / "run.pt")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        plugin.load(folder / "plugin")
        assert plugin.engine.step == first
    for step in range(first, 4):
        if step == 2 and saved is None:
            plugin.save(folder / "plugin")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, folder / "run.pt")
        if step >= 1 and unfreezes:
            model.layers[1].requires_grad_(True)
        optimizer.zero_grad()
        loss_of(model, INPUTS).backward()
        optimizer.step()
    plugin.detach()
    return model.state_dict()


@pytest.mark.parametrize("apply_to", ["gradient", "update"])
def test_a_run_that_unfreezes_is_resumed_by_the_same_script(tmp_path, apply_to):
    section = {**REMEMBERING, "filter": {**REMEMBERING["filter"], "apply_to": apply_to}}
    whole = unfreezing(section, tmp_path)
    resumed = unfreezing(section, saved=tmp_path)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_state_of_what_stays_frozen_is_refused_at_the_step_or_left(tmp_path, said):
    unfreezing(REMEMBERING, tmp_path)
    named = "of parameters that are not trained here: 'layers.1.weight' and 1 more: unfreeze"
    with pytest.raises(CheckpointError, match=named):
        unfreezing(REMEMBERING, saved=tmp_path, unfreezes=False)
    anyway = {**REMEMBERING, "checkpoint": {"strict": False}}
    unfreezing(anyway, saved=tmp_path, unfreezes=False)
    assert any(named in line and "with a new graph" in line for line in said())
    model = frozen(Blocks(), 1)
    plugin = spectral_ds.attach(model, sgd(model.parameters()), REMEMBERING)
    plugin.load(tmp_path / "plugin")
    with pytest.raises(CheckpointError, match="save after it"):
        plugin.save(tmp_path / "other")
    with pytest.raises(CheckpointError, match="save after it"):
        plugin.state_dict()
    plugin.detach()
    model = Blocks()
    plugin = spectral_ds.attach(model, sgd(model.parameters()), REMEMBERING)
    state = plugin.state_dict()
    plugin.detach()
    model = frozen(model, 1)
    plugin = spectral_ds.attach(model, sgd(model.parameters()), REMEMBERING)
    with pytest.raises(CheckpointError, match="not trained yet: unfreeze them before attaching"):
        plugin.load_state_dict(state)
    plugin.detach()
    model = frozen(Blocks(2), 1)
    plugin = spectral_ds.attach(model, sgd(model.parameters()), REMEMBERING)
    with pytest.raises(
        CheckpointError, match=r"'layers.2.weight' has shape \(6, 6\) there and not"
    ):
        plugin.load(tmp_path / "plugin")
    plugin.detach()
