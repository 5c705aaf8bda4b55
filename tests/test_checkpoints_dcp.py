"""`torch.distributed.checkpoint` carries the state between engines and world sizes, and what it
brings of another model or graph is refused on all ranks."""

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.distributed.checkpoint as dcp
from cells import CELLS, Training
from checkpoints import (
    LATER,
    RATES,
    SAVED_AFTER,
    STATEFUL,
    attempt,
    check_same_run,
    remembered,
    run_on,
    start,
)

from spectral_ds.checkpoint.checksums import add, checksum


def through_dcp(name, folder):
    """Save by DCP after four steps, go on."""
    training = start(name)
    training.train(SAVED_AFTER)
    dcp.save({"plugin": training.plugin.state_dict()}, checkpoint_id=folder / "dcp")
    weights = training.snapshot()
    if torch.distributed.get_rank() == 0:
        np.savez(folder / "weights.npz", **weights)
    return run_on(training, SAVED_AFTER, SAVED_AFTER + LATER)


def from_dcp(name, folder):
    """Load into a new training, go on."""
    training = start(name, folder / "weights.npz")
    load(training, folder)
    return run_on(training, SAVED_AFTER, SAVED_AFTER + LATER)


def load(training, folder):
    state = {"plugin": training.plugin.state_dict()}
    dcp.load(state, checkpoint_id=folder / "dcp")
    training.plugin.load_state_dict(state["plugin"])


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """`saved(name, n)`: the folder that n ranks of a cell saved into, and how they went on."""
    return remembered(ranks, tmp_path_factory, through_dcp)


@pytest.mark.parametrize(
    ("saver", "savers", "name", "world_size"),
    [
        ("fsdp2", 2, "fsdp2", 3),
        ("fsdp2", 2, "plain", 1),
        ("fsdp2", 2, "hsdp", 4),
        ("ddp", 2, "fsdp2", 3),
        ("hsdp", 4, "ddp", 2),
    ],
)
def test_a_run_resumed_by_dcp_is_the_run_that_would_have_happened(
    ranks, saved, saver, savers, name, world_size
):
    folder, uninterrupted = saved(saver, savers)
    check_same_run(ranks(world_size).run(from_dcp, name, folder), uninterrupted)


class OtherVocabulary(tiny.TinyLlama):
    """Another shape of a parameter that is not filtered."""

    def __init__(self):
        super().__init__()
        self.llama.resize_token_embeddings(60)


class OtherHead(tiny.TinyLlama):
    """Another name of a parameter that is not filtered."""

    def __init__(self):
        super().__init__()
        self.spare_too = self.spare
        del self.spare


EXCLUDED = ["*embed*", "*spare*"]
TWO = {
    "graphs": [
        {"edges": [{"family": "depth"}], "exclude": EXCLUDED},
        {"edges": [{"family": "ring"}], "exclude": EXCLUDED},
    ],
    "monitor": {"enabled": False},
}


def changed(section, **keys):
    return {**section, **keys}


COMBINATORIAL = changed(STATEFUL, graph={**STATEFUL["graph"], "laplacian": "combinatorial"})
OTHER_WEIGHT = changed(
    TWO, graphs=[TWO["graphs"][0], {**TWO["graphs"][1], "edges": [{"family": "ring", "weight": 2}]}]
)
# By name: whether two graphs were saved, what loads, into which model, and what is said.
REFUSALS = {
    "laplacian": (False, COMBINATORIAL, tiny.TinyLlama, "graph 0 of 1 differs"),
    "seed": (False, changed(STATEFUL, seed=5), tiny.TinyLlama, "graph 0 of 1 differs"),
    "second graph": (True, OTHER_WEIGHT, tiny.TinyLlama, "graph 1 of 2 differs"),
    "fewer graphs": (
        True,
        changed(TWO, graphs=TWO["graphs"][:1]),
        tiny.TinyLlama,
        "2 graphs there and 1 here",
    ),
    "shapes": (False, STATEFUL, OtherVocabulary, "parameters have other shapes"),
    "names": (True, TWO, OtherHead, "parameters have other names"),
}


def save_two(folder):
    training = Training(CELLS["fsdp2"], TWO, rates=RATES)
    training.step(0)
    dcp.save({"plugin": training.plugin.state_dict()}, checkpoint_id=folder / "dcp")
    training.close()


def refused(cases, one, two):
    """For each case: the error, and whether the plugin's state is as it was before."""
    found = {}
    for name, (has_two, section, model, _) in cases.items():
        training = Training(CELLS["fsdp2"], section, rates=RATES, model=model)
        place = two if has_two else one
        found[name] = attempt(training, lambda training, place=place: load(training, place))
        training.close()
    return found


def test_what_is_of_another_model_or_graph_is_refused_on_every_rank(ranks, saved, tmp_path):
    one, _ = saved("fsdp2", 2)
    ranks(2).run(save_two, tmp_path)
    for found in ranks(2).run(refused, REFUSALS, one, tmp_path):
        assert found.keys() == REFUSALS.keys()
        for name, (error, is_same) in found.items():
            assert error.startswith("CheckpointError"), (name, error)
            assert REFUSALS[name][3] in error, name
            assert is_same, name


def lacking(keys):
    """Load a state_dict from which rank 1 has lost a key: as `attempt`, by key."""
    training = Training(CELLS["ddp"], STATEFUL, rates=RATES)
    training.step(0)
    whole, found = training.plugin.state_dict(), {}
    training.step(1)
    for key in keys:
        state = dict(whole)
        if torch.distributed.get_rank() == 1:
            del state[key]
        found[key] = attempt(training, lambda each, state=state: each.plugin.load_state_dict(state))
    training.close()
    return found


def test_what_one_rank_lacks_is_an_error_of_all_and_changes_nothing(ranks):
    weight = "llama.model.layers.0.self_attn.q_proj.weight"
    keys = ["numbers.step", "digest.graph.0", "edges.0.weight", f"reference.{weight}"]
    for rank, found in enumerate(ranks(2).run(lacking, keys)):
        for key, (error, is_same) in found.items():
            assert error.startswith("CheckpointError"), (key, error)
            assert (weight if weight in key else key) in error
            assert ("rank 1 failed" in error) == (rank == 0)
            assert is_same, key


def not_strict(folder):
    """Of a new training from other weights: whether there is a new graph, what was said, the step,
    the references of now and of the saved state, and the loss of a step."""
    training = start("fsdp2")
    training.step(0)
    training.step(1)
    dcp.save({"plugin": training.plugin.state_dict()}, checkpoint_id=folder / "dcp")
    saved = reference_of(training)
    others = {name: value + 1 for name, value in training.snapshot().items()}
    training.close()
    if torch.distributed.get_rank() == 0:
        np.savez(folder / "others.npz", **others)
    torch.distributed.barrier()
    section = changed(COMBINATORIAL, checkpoint={"strict": False})
    training = start("fsdp2", folder / "others.npz", section)
    assert not torch.equal(reference_of(training), saved)
    (stage,), said = training.plugin.stack.graphs, []
    training.plugin.engine.log = lambda message, level=0: said.append(message)
    graph = stage.graph
    load(training, folder)
    found = stage.graph is not graph, said, training.plugin.engine.step
    found += (torch.equal(reference_of(training), saved), training.step(0))
    training.close()
    return found


def reference_of(training):
    held = training.plugin.stack.regularizer.reference.fragments
    return torch.cat([part for part in held if part is not None])


def test_unless_strict_a_new_graph_is_made_and_the_rest_is_gone_on_with(ranks, tmp_path):
    for is_new, said, step, is_saved_reference, loss in ranks(2).run(not_strict, tmp_path):
        assert is_new
        assert (step, is_saved_reference) == (2, True)
        assert np.isfinite(loss)
        [message] = said
        assert "graph 0 of 1 differs" in message
        assert "goes on with a new graph, and with step, reference" in message


def more_than_needed():
    """What FSDP2 says to a state that has a reference and means, which it does not ask for."""
    training = start("fsdp2")
    training.step(0)
    state = training.plugin.state_dict()
    training.close()
    rest = {key: value for key, value in STATEFUL.items() if key != "regularizer"}
    rest["filter"] = {**STATEFUL["filter"], "temporal": None}
    training = start("fsdp2", section=rest)
    training.plugin.load_state_dict(state)
    found = training.plugin.engine.step, training.step(1)
    state["reference.llama.model.norm.weight"].zero_()
    state["numbers.step"] += 1
    error, is_same = attempt(training, lambda each: each.plugin.load_state_dict(state))
    training.close()
    return *found, error, is_same


def test_what_a_state_has_beyond_the_configuration_is_left(ranks):
    for step, loss, error, is_same in ranks(2).run(more_than_needed):
        assert step == 1
        assert np.isfinite(loss)
        assert "'numbers.step' has another checksum" in error
        assert is_same


def altered(keys):
    """Change one element of a part of the state: as `attempt`, by key."""
    training, found = start("fsdp2"), {}
    training.step(0)
    states = [training.plugin.state_dict() for _ in keys]
    training.step(1)
    for key, state in zip(keys, states, strict=True):
        tensor = state[key]
        part = getattr(tensor, "to_local", lambda tensor=tensor: tensor)()
        if torch.distributed.get_rank() == 1 or part is tensor:
            part.view(-1)[-1] += 1
        found[key] = attempt(training, lambda each, state=state: each.plugin.load_state_dict(state))
    training.close()
    return found


def test_what_was_altered_is_named_on_every_rank_and_changes_nothing(ranks):
    weight = "llama.model.layers.0.self_attn.q_proj.weight"
    keys = [f"{kind}.{weight}" for kind in ("reference", "temporal", "sketch.0", "features.0")]
    keys += ["numbers.step", "edges.0.ends", "numbers.statistics.0.power"]
    for found in ranks(2).run(altered, keys):
        for key, (error, is_same) in found.items():
            assert error.startswith("CheckpointError"), (key, error)
            assert f"{key!r} has another checksum" in error
            assert is_same, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8])
def test_checksums_do_not_depend_on_cuts_but_on_bits_and_places(dtype):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(0, 200, (1000,), generator=generator).to(dtype)
    expected = checksum(whole, 0)
    parts = zip((0, 1, 1, 700), whole.split([1, 0, 699, 300]), strict=True)
    assert functools.reduce(add, (checksum(part, start) for start, part in parts)) == expected
    for change in (lambda t: t[[1, 0, *range(2, 1000)]], lambda t: t.roll(1), lambda t: t + 1):
        assert checksum(change(whole), 0) != expected


def load_damaged(folders):
    """Of each folder: as `attempt`."""
    training, found = start("fsdp2"), []
    for folder in folders:
        found.append(attempt(training, lambda training, folder=folder: load(training, folder)))
    training.close()
    return found


def test_damaged_files_are_an_error_of_dcp_and_change_nothing(ranks, saved, tmp_path):
    folders = [tmp_path / "cut", tmp_path / "missing"]
    harms = lambda path: path.write_bytes(path.read_bytes()[:100]), Path.unlink
    for folder, harm in zip(folders, harms, strict=True):
        shutil.copytree(saved("fsdp2", 2)[0], folder)
        harm(sorted((folder / "dcp").glob("*.distcp"))[0])
    for found in ranks(2).run(load_damaged, folders):
        for folder, (error, is_same) in zip(folders, found, strict=True):
            assert error.startswith("CheckpointException"), (folder, error)
            assert is_same, folder


def other_shapes(folder):
    similarity, depth = STATEFUL["graph"]["edges"]
    edges = [{**similarity, "neighbours": 3}, depth]
    section = changed(STATEFUL, graph={**STATEFUL["graph"], "edges": edges})
    training = Training(CELLS["fsdp2"], section, rates=RATES)
    found = attempt(training, lambda training: load(training, folder))
    training.close()
    return found


def test_dcp_itself_refuses_tensors_of_other_shapes_and_names_them(ranks, saved):
    for error, is_same in ranks(2).run(other_shapes, saved("fsdp2", 2)[0]):
        assert "Size mismatch" in error
        assert "plugin.edges.0" in error
        assert is_same
