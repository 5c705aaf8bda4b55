"""DeepSpeed's own checkpoints carry the plugin's state, also universal ones; a state that is of
another step than DeepSpeed's files is refused."""

import json
import pickletools
import zipfile

import numpy as np
import pytest
import tiny
import torch
from changing import INPUTS, REMEMBERING, Blocks, frozen, loss_of
from checkpoints import LATER, SAVED_AFTER, STATEFUL, by_adamw
from deepspeed.checkpoint import ds_to_universal
from launching import forked

import spectral_ds


def round_trip(name, folder):
    """(some more steps, the same after loading into a new engine): losses and float32 weights."""

    def go_on():
        losses = training.train(LATER, SAVED_AFTER)
        weights = training.plugin.engine.weights()
        return losses, torch.cat([weight.reshape(-1) for weight in weights]).numpy().copy()

    training = by_adamw(name)
    training.train(SAVED_AFTER)
    training.engine.save_checkpoint(str(folder), client_state={"mine": 7})
    expected = go_on()
    training.close()
    training = by_adamw(name)
    _, client_state = training.engine.load_checkpoint(str(folder))
    got = go_on()
    training.close()
    return expected, got, client_state["mine"]


@pytest.mark.parametrize("name", ["zero1", "zero2-bf16", "zero2-offload", "zero3", "zero3-bf16"])
def test_deepspeed_checkpoints_carry_the_state(ranks, tmp_path, name):
    for expected, got, mine in ranks(2).run(round_trip, name, tmp_path):
        for after, again in zip(expected, got, strict=True):
            np.testing.assert_allclose(again, after, atol=1e-6, equal_nan=False)
        assert mine == 7
    tag = (tmp_path / "latest").read_text().strip()
    manifest = json.loads((tmp_path / tag / "spectral_ds" / "manifest.json").read_text())
    assert len(manifest["files"]) == 2
    for path in (tmp_path / tag).glob("*.pt"):  # where the plugin is not installed
        assert not [name for name in modules_in(path) if name.startswith("spectral_ds")]


def modules_in(path):
    """Modules, and whatever else a file's pickle says in words, from which loading imports."""
    with zipfile.ZipFile(path) as archive:
        [pickled] = [name for name in archive.namelist() if name.endswith("data.pkl")]
        words = [word for _, word, _ in pickletools.genops(archive.read(pickled))]
    found = {word.split(" ")[0] for word in words if isinstance(word, str)} - {"spectral_ds"}
    assert "torch" in {name.split(".")[0] for name in found}
    return found


def save_and_detach(folder):
    """Losses and weights of how it goes on without the plugin."""
    training = by_adamw("zero2")
    training.train(SAVED_AFTER)
    training.engine.save_checkpoint(str(folder))
    training.plugin.detach()
    losses = training.train(LATER, SAVED_AFTER)
    weights = training.snapshot()
    training.close()
    return losses, weights


def load_without_plugin(folder):
    training = by_adamw("zero2", None)
    training.engine.load_checkpoint(str(folder))
    losses = training.train(LATER, SAVED_AFTER)
    weights = training.snapshot()
    training.close()
    return losses, weights


def test_a_checkpoint_made_with_the_plugin_is_gone_on_with_without_it(ranks, tmp_path):
    expected = ranks(2).run(save_and_detach, tmp_path)
    found = ranks(2).run(load_without_plugin, tmp_path)
    for (losses, weights), (own, others) in zip(found, expected, strict=True):
        np.testing.assert_allclose(losses, own, atol=1e-6, equal_nan=False)
        for name, value in others.items():
            np.testing.assert_allclose(weights[name], value, atol=1e-6, equal_nan=False)


def save_for_conversion(stage, folder):
    training = by_adamw(f"zero{stage}")
    training.train(SAVED_AFTER)
    training.engine.save_checkpoint(str(folder), tag="mine")
    losses = training.train(LATER, SAVED_AFTER)
    training.close()
    return losses


def load_converted(stage, folder, section):
    training = by_adamw(f"zero{stage}", section, checkpoint={"load_universal": True})
    training.engine.load_checkpoint(str(folder), tag="mine_universal")
    if stage == 3:
        set_right(training.engine.optimizer)
    losses = training.train(LATER, SAVED_AFTER)
    training.close()
    return losses


def set_right(optimizer):
    """What DeepSpeed 0.19.8 restores wrongly in stage 3, with or without the plugin.

    Every group gets the first one's learning rate, and all sub-groups one tensor that counts the
    steps, which each of them then increments.
    """
    for group, rate in zip(optimizer.param_groups, tiny.ADAM_RATES, strict=True):
        group["lr"] = rate
    for state in optimizer.optimizer.state.values():
        state["step"] = state["step"].clone()


@pytest.mark.parametrize(
    ("stage", "other", "world_size"),
    [(2, 1, 3), (3, 3, 3)],
)
def test_universal_checkpoints_find_the_state_at_another_world_size(
    ranks, tmp_path, stage, other, world_size
):
    """Between stage 3 and the others, DeepSpeed 0.19.8 itself does not load them.

    It looks for the model's file under the name of its own stage, finds none, and raises an
    AssertionError without a message.
    """
    expected = np.mean(ranks(2).run(save_for_conversion, stage, tmp_path), axis=0)
    folders = ["--input_folder", tmp_path / "mine", "--output_folder", tmp_path / "mine_universal"]
    options = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    if stage < 3:
        options.append("--inject_missing_state")
    done = forked(1, ds_to_universal.__file__, *folders, *options, runner=False)
    assert done.code == 0, done.stderr
    pool = ranks(world_size)
    got = np.mean(pool.run(load_converted, other, tmp_path, STATEFUL), axis=0)
    np.testing.assert_allclose(got, expected, atol=2e-6, equal_nan=False)
    bare = np.mean(pool.run(load_converted, other, tmp_path, None), axis=0)
    assert np.abs(bare - expected).max() > 1e-5


def test_saving_can_be_switched_off(ranks, tmp_path):
    ranks(1).run(save_switched_off, tmp_path)
    assert not list(tmp_path.glob("*/spectral_ds"))


def unfreezing(folder, resumes):
    """Weights of ZeRO 0 after four steps, or resumed after two; a block joins at step 1."""
    model = frozen(Blocks(), 1)
    engine, *_ = spectral_ds.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config={**tiny.deepspeed_config(0), "spectral_ds": REMEMBERING},
    )
    if resumes:
        engine.load_checkpoint(str(folder))
    for step in range(2 if resumes else 0, 4):
        if step == 2 and not resumes:
            engine.save_checkpoint(str(folder))
        if step >= 1:
            model.layers[1].requires_grad_(True)
        engine.backward(loss_of(engine, INPUTS))
        engine.step()
    engine.destroy()
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


def test_a_run_of_zero_0_that_unfreezes_is_resumed(ranks, tmp_path):
    [whole] = ranks(1).run(unfreezing, tmp_path, False)
    [resumed] = ranks(1).run(unfreezing, tmp_path, True)
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)


def save_switched_off(folder):
    training = by_adamw("zero2", {**STATEFUL, "checkpoint": {"enabled": False}})
    training.engine.save_checkpoint(str(folder))
    assert training.plugin is not None
    training.close()


def save_twice_cut_off(folder):
    """Tag "cut" was saved at step 1 and, but for DeepSpeed's files, at step 2; "good" at step 1."""
    training = by_adamw("zero2")
    engine = training.engine
    training.step()
    engine.save_checkpoint(str(folder), tag="good")
    engine.save_checkpoint(str(folder), tag="cut")
    training.step()

    def fail(*_):
        raise OSError("no space left")

    engine.checkpoint_engine.create = fail
    with pytest.raises(OSError, match="no space left"):
        engine.save_checkpoint(str(folder), tag="cut")
    training.close()


@pytest.fixture(scope="module")
def cut_off(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    ranks(2).run(save_twice_cut_off, folder)
    return folder


def load(folder, tag, strict, *arguments, **options):
    """(what was raised, what was said, the engine's step, whether the graph is as it was)."""
    training = by_adamw("zero2", {**STATEFUL, "checkpoint": {"strict": strict}})
    plugin, said, error = training.plugin, [], ""
    plugin.engine.log = lambda message, level=0: said.append(message)
    graph = plugin.graph
    try:
        training.engine.load_checkpoint(str(folder), tag, *arguments, **options)
    except spectral_ds.checkpoint.CheckpointError as problem:
        error = str(problem)
    found = error, said, training.engine.global_steps, plugin.graph is graph
    training.close()
    return found


def load_cut(folder):
    return load(folder, "cut", True), load(folder, "cut", False)


def test_a_state_of_another_step_than_deepspeeds_files_is_refused(ranks, cut_off):
    for strict, lenient in ranks(2).run(load_cut, cut_off):
        error, _, _, is_same = strict
        assert "state is of step 2" in error
        assert "the checkpoint is of step 1" in error
        assert is_same
        error, [message], step, is_same = lenient
        assert not error
        assert "state is of step 2" in message
        assert "goes on with a new graph" in message
        assert step == 1
        assert not is_same


def load_without_optimizer(folder):
    return load(folder, "good", True, load_optimizer_states=False)


def test_without_the_optimizers_states_the_plugins_is_loaded(ranks, cut_off):
    for found in ranks(2).run(load_without_optimizer, cut_off):
        assert found == ("", [], 1, False)


def save_weights(stage, folder, section):
    training = by_adamw(f"zero{stage}", section)
    training.train(2)
    training.engine.save_checkpoint(str(folder), tag=f"{stage}")
    training.close()


def warm_start(stage, folder, arguments=(), options=None):
    """Of a new engine: what was said, its step, R, ‖Δ‖ and how far edges are from a new graph's."""
    section = {**STATEFUL, "graph": {"edges": [{"family": "similarity"}]}}
    training = by_adamw(f"zero{stage}", section)
    engine, plugin, said = training.engine, training.plugin, []
    plugin.engine.log = lambda message, level=0: said.append(message)
    before = plugin.stack.regularizer.metrics(plugin.stack.weights())
    old = plugin.graph.laplacian().toarray()
    engine.load_checkpoint(str(folder), f"{stage}", *arguments, **(options or {}))
    new = plugin.graph.laplacian().toarray()
    metrics = plugin.stack.regularizer.metrics(plugin.stack.weights())
    plugin.stack.graphs[0].build()
    fresh = plugin.graph.laplacian().toarray()
    step = engine.global_steps
    assert np.isfinite(training.step())
    training.close()
    assert before["perturbation"] == 0
    return said, step, metrics, np.abs(new - fresh).max(), np.abs(new - old).max()


@pytest.mark.parametrize("stage", [0, 2])
def test_weights_loaded_alone_begin_a_new_training(ranks, tmp_path, stage):
    """Not of stage 3, whose weights lie in the optimizer's files: DeepSpeed 0.19.8 loads none."""
    ranks(2).run(save_weights, stage, tmp_path, STATEFUL)
    given = [((), {"load_module_only": True}), ((True, False, False, True), {})]
    for arguments, options in given[: 2 if stage == 2 else 1]:
        for found in ranks(2).run(warm_start, stage, tmp_path, arguments, options):
            [message], step, metrics, distance, change = found
            assert "weights were loaded alone" in message
            assert step == 0
            assert metrics == {"regularizer": 0, "perturbation": 0}
            assert distance < 1e-6
            assert change > 1e-3


def test_a_checkpoint_made_without_the_plugin_is_gone_on_with_by_a_new_graph(ranks, tmp_path):
    ranks(2).run(save_weights, 2, tmp_path, None)
    for [message], step, metrics, distance, change in ranks(2).run(warm_start, 2, tmp_path):
        assert message.startswith("the checkpoint was made without the plugin; it goes on with the")
        assert step == 2
        assert metrics["perturbation"] > 0  # from the reference of before
        assert distance < 1e-6
        assert change > 1e-3


def load_by_hand(folder, step):
    training = by_adamw("zero2")
    plugin, said = training.plugin, []
    training.engine.global_steps = step
    plugin.engine.log = lambda message, level=0: said.append(message)
    graph = plugin.graph
    plugin.load(folder / "good" / "spectral_ds")
    is_new = plugin.graph is not graph
    training.close()
    return said, is_new


def test_loading_by_hand_warns_where_the_engine_is_at_another_step(ranks, cut_off):
    for said, is_new in ranks(2).run(load_by_hand, cut_off, 0):
        [message] = said
        assert "state is of step 1, but the engine is at step 0" in message
        assert is_new
    assert ranks(2).run(load_by_hand, cut_off, 1) == [([], True)] * 2
