"""Co-activation graphs on ranks: the same wherever their inputs come from, and in checkpoints."""

import functools
import os

import activations
import numpy as np
import pytest
import tiny
import torch
import torch.distributed.checkpoint as dcp
from activations import CalledByIds, Writer, expected_update, section_of
from cells import ThereAndBack, Training, steps_from_here
from expected import relative_error

SECTION = section_of({"rank": 8})
RATES = (0.5, 0.25)


def operators_of(graph):
    return {key: graph.operator(*key) for key in graph.held.graph_of}


def same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for key, wanted in expected.items():
        assert np.abs(found[key] - wanted).max() <= tolerance * np.abs(wanted).max(), key


# Learning from training

LEARNS = section_of({"rank": 8, "learn": "training", "samples": 30}, filter={"tau": 0.5})


def learned_from_two_steps(name, accumulation):
    """A step at rate 0, and the next: what was known after the first, and what the second did."""
    training = Training(name, LEARNS, torch.optim.SGD, model=CalledByIds, accumulation=accumulation)
    groups = base_optimizer(training).param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
    training.step(0)
    is_idle = training.plugin.graph.learn is None
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    before = training.snapshot()
    training.step(1)
    after = training.snapshot()
    moved = {n: (before[n] - after[n]) / rate for n, rate in training.rates().items()}
    training.close()
    return is_idle, moved


def base_optimizer(training):
    if training.cell.engine == "deepspeed":
        return training.engine.basic_optimizer
    return training.optimizer


def second_step():
    """Its facts without the plugin."""
    training = Training("plain", None, ThereAndBack, model=CalledByIds)
    [facts] = steps_from_here(training, [None], 1)
    return facts, [tiny.batches(1, index)[0].numpy() for index in (0, 1)]


@pytest.mark.parametrize(
    ("name", "world_size", "accumulation"),
    [("zero2", 2, 2), ("zero3", 3, 1), ("fsdp2", 2, 2), ("ddp", 2, 1)],
)
def test_what_is_learned_comes_from_the_micro_batches_of_all_ranks(
    ranks, name, world_size, accumulation
):
    """24 sequences a step; 30 are enough."""
    plain, batches = ranks(1).run(second_step)[0]
    expected = expected_update(LEARNS, plain, learned=dict(enumerate(batches)))
    for is_idle, moved in ranks(world_size).run(learned_from_two_steps, name, accumulation):
        assert is_idle
        assert relative_error(moved, expected) <= 1e-5


# Inputs to keep


def sections_of_sources(folder):
    keeps = {"generated": "generated", "given": "given", "texts": str(folder / "keep.txt")}
    edge = {"rank": 8, "samples": 70, "tokenizer": str(folder)}
    return {name: section_of({**edge, "keep": keep}) for name, keep in keeps.items()}


def of_every_source(name, folder):
    """Operators of each kind of inputs, and of a file of them; then a step is still possible."""
    training = Training(name, None, model=Writer, rates=RATES)
    found = {}
    for source, section in sections_of_sources(folder).items():
        training.attach(section)
        if source == "given":
            for number in (2, 1):  # ranks have unequal shares of three batches, and of one
                ids = activations.random_ids(20, seed=number).split(8)[: 2 * number - 1]
                training.plugin.calibrate([{"input_ids": each} for each in ids])
        file = folder / f"{source} by {name}.safetensors"
        training.plugin.save_activations(file)
        found[source] = operators_of(training.plugin.graph)
        training.plugin.detach()
        training.attach(section_of({"rank": 8, "keep": str(file)}))
        same(operators_of(training.plugin.graph), found[source], 0.0)
        training.plugin.detach()
    training.plugin = None
    training.attach(SECTION)
    training.step()
    training.close()
    return found


@pytest.fixture(scope="module")
def sources(ranks, tmp_path_factory):
    """What one process made of every source, and the folder of them."""
    folder = tmp_path_factory.mktemp("sources")
    activations.words(folder)
    activations.write_texts(folder / "keep.txt")
    return ranks(1).run(of_every_source, "plain", folder)[0], folder


@pytest.mark.parametrize(
    ("name", "world_size"), [("zero2", 2), ("zero3", 2), ("fsdp2", 3), ("ddp", 2)]
)
def test_every_source_makes_the_same_graph_on_ranks(ranks, sources, name, world_size):
    expected, folder = sources
    for found in ranks(world_size).run(of_every_source, name, folder):
        for source, operators in expected.items():
            same(found[source], operators, 1e-6)


def of_experts(name, kind):
    """Operators of stacked experts and routers, of three sequences of six random ids; then of two
    batches with padding."""
    section = section_of({"rank": 8, "samples": 3, "length": 6})
    training = Training(name, section, model=functools.partial(tiny.experts, kind))
    found = operators_of(training.plugin.graph)
    ids, mask = activations.random_ids(6, 5, vocabulary=13), torch.ones(6, 5, dtype=torch.long)
    mask[0, 2:], mask[4, 1:] = 0, 0
    whole = [{"input_ids": ids[at], "attention_mask": mask[at]} for at in (slice(3), slice(3, 6))]
    training.plugin.calibrate(whole)
    padded = operators_of(training.plugin.graph)
    training.close()
    return found | {(f"padded {name}", matrix): each for (name, matrix), each in padded.items()}


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_experts_are_seen_inside_of_sharded_modules(ranks, kind):
    [expected] = ranks(1).run(of_experts, "plain", kind)
    assert len([key for key in expected if "experts.down_proj" in key[0]]) > 1
    assert any(key[0].endswith(("gate.weight", "router.weight")) for key in expected)
    for name in ("zero3", "fsdp2"):
        for found in ranks(2).run(of_experts, name, kind):
            same(found, expected, 1e-6)


def uses(name, file):
    """Operators of a file of statistics."""
    training = Training(name, section_of({"rank": 8, "keep": str(file)}), model=Writer)
    found = operators_of(training.plugin.graph)
    training.close()
    return found


def test_statistics_serve_other_engines_and_world_sizes(ranks, sources):
    expected, folder = sources
    for found in ranks(3).run(uses, "zero3", folder / "generated by plain.safetensors"):
        same(found, expected["generated"], 0.0)


def refused(folder):
    """Errors of both ranks, of which only one has the file, and hooks that each has left."""
    rank = torch.distributed.get_rank()
    here = os.getcwd()
    os.chdir(folder / str(rank))
    found = []
    try:
        for keep, model in (("file.txt", CalledByIds), ("random", tiny.TinyLlama)):
            training = Training("zero2", None, model=model)
            before = hooks_of(training.module)
            try:
                training.attach(section_of({"keep": keep, "tokenizer": str(folder)}))
            except Exception as error:
                found.append(f"{type(error).__name__}: {error}")
            found.append(hooks_of(training.module) - before)
            training.close()
    finally:
        os.chdir(here)
    return found


def failed_calls():
    """Errors of a model that takes no token ids, and of a batch that only one rank gets."""
    found = []
    training = Training("zero2", None, model=CalledByIds)
    forward, training.module.forward = training.module.forward, lambda pixels: pixels
    try:
        training.attach(section_of({"keep": "random"}))
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    training.module.forward = forward
    training.attach(section_of({"keep": "given"}))
    ids = torch.randint(53, (2, 5), generator=torch.Generator().manual_seed(0))
    try:
        training.plugin.calibrate([ids, {"pixels": ids}])
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    training.plugin.calibrate([ids, ids])
    found.append(training.plugin.graph.is_ready)
    training.close()
    return found


def hooks_of(module):
    return sum(len(each._forward_pre_hooks) for each in module.modules())


def test_what_one_rank_cannot_use_is_refused_on_all(ranks, tmp_path):
    activations.words(tmp_path)
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    activations.write_texts(tmp_path / "0" / "file.txt")
    results = ranks(2).run(refused, tmp_path)
    for missing, hooks, speechless, hooks_too in results:
        assert (hooks, hooks_too) == (0, 0)
        assert missing.startswith("SpectralConfigError: spectral_ds.graph.edges[0].keep")
        assert "no file on rank 1" in missing
        assert speechless.startswith("SpectralConfigError: spectral_ds.graph.edges[0].keep")
        assert "TinyLlama has no config.vocab_size" in speechless


def test_a_call_that_fails_on_one_rank_fails_on_all(ranks):
    for rank, (refused, failed, is_ready) in enumerate(ranks(2).run(failed_calls)):
        assert refused.startswith("SpectralConfigError: spectral_ds.graph.edges[0].keep")
        assert "CalledByIds cannot be called with it" in refused
        assert "plugin.calibrate(batches)" in refused
        assert failed.startswith("TypeError: ")
        assert "pixels" in failed
        assert ("rank 1 failed: " in failed) == (rank == 0)
        assert is_ready  # and a further try works


# Checkpoints

STATEFUL = section_of(
    {"rank": 8, "learn": "training", "samples": 20},
    filter={"tau": 0.5},
    regularizer={"strength": 0.05, "ridge": 0.5, "coupling": "decoupled"},
)
SAVED_AFTER, LATER = 2, 2


class Prepared(CalledByIds):
    """Begins with weights from a file, if there are any."""

    source = None

    def __init__(self):
        super().__init__()
        if Prepared.source is not None:
            named = dict(self.named_parameters())
            with torch.no_grad():
                for name, value in np.load(Prepared.source).items():
                    named[name].copy_(torch.from_numpy(value))


def start(name, weights=None, **config):
    Prepared.source = weights
    try:
        return Training(name, STATEFUL, rates=RATES, model=Prepared, **config)
    finally:
        Prepared.source = None


def known(training):
    """All that is known of what is kept and learned."""
    graph = training.plugin.graph
    found = {f"keep {n} {m}": graph.operator(n, m) for n, m in graph.held.graph_of}
    learned = {} if graph.learn is None else dict.fromkeys(graph.learn.leaders)
    return found | {
        f"learn {name}": graph.learn.of(name)[0].matrix()
        for name in learned
        if graph.learn.of(name)[0] is not None
    }


def gone_on(training):
    """What is known, and the weights after some more steps."""
    found = known(training)
    training.train(LATER, SAVED_AFTER)
    weights = training.snapshot()
    training.close()
    return found, weights


def saved(name, folder):
    """Save in every way that the engine has, then go on."""
    training = start(name)
    training.train(SAVED_AFTER)
    training.plugin.save(folder / "spectral_ds")
    weights = training.snapshot()
    if torch.distributed.get_rank() == 0:
        np.savez(folder / "weights.npz", **weights)
    if training.cell.engine == "deepspeed":
        training.engine.save_checkpoint(str(folder / "deepspeed"), tag="mine")
    else:
        dcp.save({"plugin": training.plugin.state_dict()}, checkpoint_id=folder / "dcp")
    return gone_on(training)


def resumed(name, folder, how):
    """(what a new graph of the resumed weights would have been, what is gone on with)."""
    training = start(name, folder / "weights.npz")
    fresh = known(training)
    if how == "dcp":
        state = {"plugin": training.plugin.state_dict()}
        dcp.load(state, checkpoint_id=folder / "dcp")
        training.plugin.load_state_dict(state["plugin"])
    elif how == "deepspeed":
        training.engine.load_checkpoint(str(folder / "deepspeed"), tag="mine")
    else:
        if training.cell.engine == "deepspeed":
            training.engine.global_steps = SAVED_AFTER  # its own checkpoint would restore it
        training.plugin.load(folder / "spectral_ds")
    return fresh, *gone_on(training)


@pytest.fixture(scope="module")
def checkpoints(ranks, tmp_path_factory):
    """`checkpoints(name, n)`: where n ranks of a cell saved, and how they went on."""

    @functools.cache
    def made(name, world_size):
        folder = tmp_path_factory.mktemp("checkpoint")
        return folder, ranks(world_size).run(saved, name, folder)[0]

    return made


@pytest.mark.parametrize(
    ("saver", "savers", "how", "name", "world_size"),
    [
        ("zero2", 2, "deepspeed", "zero2", 2),
        ("zero3", 2, "deepspeed", "zero3", 2),
        ("zero2", 2, "files", "zero3", 3),
        ("zero3", 2, "files", "plain", 1),
        ("fsdp2", 2, "dcp", "fsdp2", 3),
        ("fsdp2", 2, "dcp", "plain", 1),
        ("ddp", 2, "dcp", "fsdp2", 2),
    ],
)
def test_a_resumed_run_goes_on_with_the_graphs_of_the_pretrained_model(
    ranks, checkpoints, saver, savers, how, name, world_size
):
    folder, (expected, weights) = checkpoints(saver, savers)
    assert any(key.startswith("learn") for key in expected)
    for fresh, found, after in ranks(world_size).run(resumed, name, folder, how):
        same(found, expected, 1e-6)
        assert max(np.abs(fresh[key] - expected[key]).max() for key in fresh) > 1e-2
        for parameter, value in weights.items():
            np.testing.assert_allclose(after[parameter], value, atol=1e-5)
