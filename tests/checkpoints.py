"""Runs that are saved and gone on with, for the tests of checkpoints.

All with everything that has a state: two edge families, running means, `temporal`, a regularizer.
"""

import functools
from pathlib import Path

import numpy as np
import tiny
import torch
from cells import Training
from torch.distributed.checkpoint.api import CheckpointException

STATEFUL = {
    "graph": {
        "edges": [
            {"family": "similarity", "features": "gradient", "sketch_width": 8},
            {"family": "depth"},
        ],
        "refresh_interval": 3,
    },
    "filter": {
        "response": "wiener",
        "bands": 4,
        "strength": 0.8,
        "warmup_steps": 7,
        "temporal": {"decay": 0.5, "amplify": 0.3},
    },
    "statistics": {"interval": 1, "decay": 0.9},
    "regularizer": {"strength": 0.05, "ridge": 0.5, "coupling": "decoupled"},
    "monitor": {"interval": 1},
}
RATES = (0.2, 0.1)
SAVED_AFTER, LATER = 4, 4


class Prepared(tiny.TinyLlama):
    """Begins with weights from a file, if there are any."""

    source: Path | None = None

    def __init__(self) -> None:
        super().__init__()
        if Prepared.source is not None:
            found = np.load(Prepared.source)
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    parameter.copy_(torch.from_numpy(found[name]))


def start(name, weights=None, section=STATEFUL):
    Prepared.source = weights
    try:
        return Training(name, section, rates=RATES, model=Prepared)
    finally:
        Prepared.source = None


def run_on(training, first, last):
    """Losses of some steps and the weights after them."""
    losses = training.train(last - first, first)
    weights = training.snapshot()
    metrics = training.plugin.metrics()
    training.close()
    return losses, weights, metrics


def save(training, folder):
    """The plugin's state and the weights."""
    training.plugin.save(folder / "spectral_ds")
    weights = training.snapshot()
    if torch.distributed.get_rank() == 0:
        np.savez(folder / "weights.npz", **weights)


def save_and_go_on(name, folder):
    """Save the plugin and the weights after four steps, then go on for five."""
    training = start(name)
    training.train(SAVED_AFTER)
    save(training, folder)
    return run_on(training, SAVED_AFTER, SAVED_AFTER + LATER)


def remembered(ranks, tmp_path_factory, save):
    """`save(name, folder)` on n ranks, once for each name and n: the folder and what it gave."""

    @functools.cache
    def saved(name, world_size):
        folder = tmp_path_factory.mktemp("checkpoint")
        return folder, ranks(world_size).run(save, name, folder)

    return saved


def check_same_run(results, uninterrupted):
    """Resumed ranks end with the weights and edges, and had the mean losses, of the others."""
    _, weights, metrics = uninterrupted[0]
    for _, got, got_metrics in results:
        for parameter, value in weights.items():
            np.testing.assert_allclose(got[parameter], value, atol=1e-4, equal_nan=False)
        assert got_metrics["edges"] == metrics["edges"]
    mean = [np.mean([r[0] for r in runs], axis=0) for runs in (results, uninterrupted)]
    np.testing.assert_allclose(mean[0], mean[1], atol=1e-4, equal_nan=False)


def resumed(name, folder, step=SAVED_AFTER):
    """A new training that goes on from a folder of `save`."""
    training = start(name, folder / "weights.npz")
    if training.cell.engine == "deepspeed":
        training.engine.global_steps = step  # its own checkpoint would restore it
    training.plugin.load(folder / "spectral_ds")
    return training


def resume(name, folder, step=SAVED_AFTER):
    return run_on(resumed(name, folder, step), step, SAVED_AFTER + LATER)


def resume_and_save(name, folder, until, target):
    """Go on for a few steps, and save anew."""
    training = resumed(name, folder)
    training.train(until - SAVED_AFTER, SAVED_AFTER)
    save(training, target)
    training.close()


def by_adamw(name, section=STATEFUL, **config):
    """A new training of a DeepSpeed cell with AdamW, of two learning rates."""
    return Training(name, section, torch.optim.AdamW, tiny.ADAM_RATES, **config)


def attempt(training, action):
    """The error of loading, and whether nothing was changed by it."""
    before, graphs = state_of(training), [stacked.graph for stacked in training.plugin.stack.graphs]
    error = ""
    try:
        action(training)
    except (Exception, CheckpointException) as problem:  # DCP's is no Exception
        error = f"{type(problem).__name__}: {problem}"
    after = state_of(training)
    is_same = all(
        stage.graph is graph
        for stage, graph in zip(training.plugin.stack.graphs, graphs, strict=True)
    )
    is_same &= before.keys() == after.keys() and all(
        np.array_equal(before[key], after[key]) for key in before
    )
    return error, is_same


def state_of(training):
    """All that this rank would save (collective)."""
    state = training.plugin._persistence.state()
    found = {name: number.numpy() for name, number in state.numbers.items()}
    for index, edges in enumerate(state.edges):
        found[f"edges {index}"] = np.stack((edges.source, edges.target, edges.weight))
    for kind, pieces in state.pieces.items():
        for fragment, value in zip(pieces.fragments, pieces.values, strict=True):
            if value is not None:
                found[f"{kind} {fragment}"] = value.numpy()
    return {name: values.copy() for name, values in found.items()}
