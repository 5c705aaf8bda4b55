"""`torch.distributed.checkpoint` carries the state between engines and world sizes, and what it
brings of another model or graph is refused on all ranks."""

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
    check_same_run,
    remembered,
    run_on,
    start,
)


def through_dcp(name, folder):
    """Save by DCP after four steps, go on."""
    training = start(name)
    for index in range(SAVED_AFTER):
        training.step(index)
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
        ("fsdp2", 3, "fsdp2", 3),
        ("ddp", 2, "plain", 1),
        ("ddp", 2, "fsdp2", 3),
        ("hsdp", 4, "hsdp", 4),
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
REFUSALS = {
    "laplacian": (STATEFUL, COMBINATORIAL, tiny.TinyLlama, "graph 0 of 1 differs"),
    "seed": (STATEFUL, changed(STATEFUL, seed=5), tiny.TinyLlama, "graph 0 of 1 differs"),
    "second graph": (TWO, OTHER_WEIGHT, tiny.TinyLlama, "graph 1 of 2 differs"),
    "fewer graphs": (
        TWO,
        changed(TWO, graphs=TWO["graphs"][:1]),
        tiny.TinyLlama,
        "2 graphs there and 1 here",
    ),
    "shapes": (STATEFUL, STATEFUL, OtherVocabulary, "parameters have other shapes"),
    "names": (TWO, TWO, OtherHead, "parameters have other names"),
}


def refused(cases, folder):
    """For each case: the error, and whether the plugin's state is as it was before."""
    found = {}
    for number, (name, (section, other, model, _)) in enumerate(cases.items()):
        place = folder / str(number)
        training = Training(CELLS["fsdp2"], section, rates=RATES)
        training.step(0)
        dcp.save({"plugin": training.plugin.state_dict()}, checkpoint_id=place / "dcp")
        training.close()
        training = Training(CELLS["fsdp2"], other, rates=RATES, model=model)
        found[name] = attempt(training, lambda training, place=place: load(training, place))
        training.close()
    return found


def attempt(training, action):
    """The error of loading, and whether nothing was changed by it."""
    before, graphs = state_of(training), [stage.graph for stage in training.plugin.stages]
    error = ""
    try:
        action(training)
    except (Exception, dcp.api.CheckpointException) as problem:  # DCP's is no Exception
        error = f"{type(problem).__name__}: {problem}"
    after = state_of(training)
    is_same = all(
        stage.graph is graph for stage, graph in zip(training.plugin.stages, graphs, strict=True)
    )
    is_same &= before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) for key in before
    )
    return error, is_same


def state_of(training):
    return {
        key: getattr(value, "to_local", lambda value=value: value)().clone()
        for key, value in training.plugin.state_dict().items()
    }


def test_what_is_of_another_model_or_graph_is_refused_on_every_rank(ranks, tmp_path):
    for found in ranks(2).run(refused, REFUSALS, tmp_path):
        for name, (error, is_same) in found.items():
            assert error.startswith("CheckpointError"), (name, error)
            assert REFUSALS[name][3] in error, name
            assert is_same, name


def lacking(keys):
    """Load a state_dict from which rank 1 has lost a key: as `attempt`."""
    found = {}
    for key in keys:
        training = Training(CELLS["ddp"], STATEFUL, rates=RATES)
        training.step(0)
        state = training.plugin.state_dict()
        if torch.distributed.get_rank() == 1:
            del state[key]
        training.step(1)
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
    """Whether there is a new graph, what was said, and whether the run goes on."""
    training = Training(CELLS["fsdp2"], STATEFUL, rates=RATES)
    training.step(0)
    dcp.save({"plugin": training.plugin.state_dict()}, checkpoint_id=folder / "dcp")
    training.close()
    section = changed(COMBINATORIAL, checkpoint={"strict": False})
    training = Training(CELLS["fsdp2"], section, rates=RATES)
    (stage,), said = training.plugin.stages, []
    training.plugin.engine.log = lambda message, level=0: said.append(message)
    graph = stage.graph
    load(training, folder)
    is_new = stage.graph is not graph
    loss = training.step(0)
    training.close()
    return is_new, said, loss


def test_unless_strict_a_new_graph_is_made(ranks, tmp_path):
    for is_new, said, loss in ranks(2).run(not_strict, tmp_path):
        assert is_new
        assert np.isfinite(loss)
        [message] = said
        assert "graph 0 of 1 differs" in message
        assert "goes on with a new graph" in message


def other_shapes(folder):
    training = Training(CELLS["fsdp2"], STATEFUL, rates=RATES)
    dcp.save({"plugin": training.plugin.state_dict()}, checkpoint_id=folder / "dcp")
    training.close()
    similarity, depth = STATEFUL["graph"]["edges"]
    edges = [{**similarity, "neighbours": 3}, depth]
    section = changed(STATEFUL, graph={**STATEFUL["graph"], "edges": edges})
    training = Training(CELLS["fsdp2"], section, rates=RATES)
    found = attempt(training, lambda training: load(training, folder))
    training.close()
    return found


def test_dcp_itself_refuses_tensors_of_other_shapes_and_names_them(ranks, tmp_path):
    for error, is_same in ranks(2).run(other_shapes, tmp_path):
        assert "Size mismatch" in error
        assert "plugin.edges.0" in error
        assert is_same
