"""Files of the plugin's state that cannot be used are named on all ranks, and change nothing."""

import json
import shutil

import pytest
from checkpoints import SAVED_AFTER, STATEFUL, attempt, start
from safetensors import SafetensorError

from spectral_ds.checkpoint import folder as state_files
from spectral_ds.checkpoint.folder import manifest_digest


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "spectral_ds"
    ranks(2).run(save, folder)
    return folder


def save(folder):
    training = start("zero2")
    training.train(SAVED_AFTER)
    training.plugin.save(folder)
    training.close()


def change_bytes(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def change_manifest(folder, key, value):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest[key] = value(manifest[key])
    manifest["sha256"] = manifest_digest(manifest)
    path.write_text(json.dumps(manifest))


def first_file(folder):
    return sorted(folder.glob("rank-*.safetensors"))[0]


def make_unreadable(folder):
    """Opening it is an OSError, for root too."""
    path = first_file(folder)
    path.unlink()
    path.mkdir()
    size = path.stat().st_size
    change_manifest(
        folder,
        "files",
        lambda files: [{**f, "bytes": size} if f["name"] == path.name else f for f in files],
    )


DAMAGES = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "cut manifest": (
        lambda f: (f / "manifest.json").write_text('{"version": 3'),
        "manifest.json cannot be read",
    ),
    "other version": (
        lambda f: change_manifest(f, "version", lambda v: v + 1),
        "is of version 4",
    ),
    "no checksum": (
        lambda f: (f / "manifest.json").write_text('{"version": 3}'),
        "must be an object with a version and a checksum",
    ),
    "altered manifest": (
        lambda f: (f / "manifest.json").write_text(
            (f / "manifest.json").read_text().replace("llama.model.norm", "llama.model.form")
        ),
        "manifest.json is altered",
    ),
    "no file": (lambda f: first_file(f).unlink(), "safetensors is missing"),
    "cut file": (
        lambda f: first_file(f).write_bytes(first_file(f).read_bytes()[:-5]),
        "bytes, not",
    ),
    "altered file": (lambda f: change_bytes(first_file(f)), "is altered"),
    "other model": (
        lambda f: change_manifest(f, "model", lambda m: {**m, "llama.model.norm.weight": [25]}),
        "parameter 'llama.model.norm.weight' has shape (25,) there and (24,) here",
    ),
    "other graph": (
        lambda f: change_manifest(f, "graphs", lambda g: ["0" * 64]),
        "another graph configuration (spectral_ds.graph, graphs or seed): graph 0 of 1 differs",
    ),
    "nothing": (shutil.rmtree, "manifest.json is missing"),
    "unreadable file": (make_unreadable, "safetensors cannot be read: "),
    "unreadable manifest": (
        lambda f: ((f / "manifest.json").unlink(), (f / "manifest.json").mkdir()),
        "manifest.json cannot be read: ",
    ),
}


@pytest.fixture(scope="module")
def loaded(ranks, saved, tmp_path_factory):
    """By damage, what each rank found when it loaded that: strictly, and anyway."""
    folders = {}
    for damage, (harm, _) in DAMAGES.items():
        folders[damage] = tmp_path_factory.mktemp("damaged") / "spectral_ds"
        shutil.copytree(saved, folders[damage])
        harm(folders[damage])
    return ranks(2).run(load_damaged, folders), ranks(2).run(load_anyway, folders)


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_used_is_named_on_every_rank(loaded, damage):
    strictly, anyway = loaded
    message = DAMAGES[damage][1]
    for found in strictly:
        error, is_same = found[damage]
        assert error.startswith("CheckpointError")
        assert message in error
        assert is_same
    for found in anyway:
        is_new, [said] = found[damage]
        assert is_new
        assert message in said
        assert ("with step" in said) == (damage == "other graph")
        assert ("nothing of the saved state" in said) == (damage != "other graph")


def load_damaged(folders):
    """Of each folder, the error, and whether the plugin is as it was before."""
    training, found = start("zero2"), {}
    for damage, folder in folders.items():
        found[damage] = attempt(training, lambda each, folder=folder: each.plugin.load(folder))
    training.close()
    return found


def load_anyway(folders):
    """Of each folder, whether there is a new graph, and what was said."""
    training, found = start("zero2", section={**STATEFUL, "checkpoint": {"strict": False}}), {}
    for damage, folder in folders.items():
        said = []
        training.engine.global_steps = SAVED_AFTER
        training.plugin.engine.log = lambda message, level=0, said=said: said.append(message)
        graph = training.plugin.graph
        training.plugin.load(folder)
        training.step()
        found[damage] = training.plugin.graph is not graph, said
    training.close()
    return found


def fail_to_save(folder):
    """Rank 1 finds the disk full, as safetensors says it."""
    training = start("zero2")
    if training.plugin.engine.everyone.rank == 1:

        def full(*_):
            raise SafetensorError("I/O error: No space left on device")

        usual, state_files.save_file = state_files.save_file, full
    try:
        training.plugin.save(folder)
    finally:
        if training.plugin.engine.everyone.rank == 1:
            state_files.save_file = usual
        training.close()


def fail_to_see(folder):
    """Rank 1 saves into a folder of its own, as on a disk of another node."""
    training = start("zero2")
    try:
        training.plugin.save(folder / str(training.plugin.engine.everyone.rank))
    finally:
        training.close()


def load(folder):
    training = start("zero2")
    training.engine.global_steps = SAVED_AFTER
    training.plugin.load(folder)
    training.close()


def test_a_rank_that_cannot_write_is_an_error_of_all_and_what_was_saved_stays(
    ranks, tmp_path, saved
):
    folder = tmp_path / "spectral_ds"
    shutil.copytree(saved, folder)
    for outcome in ranks(2).outcomes(fail_to_save, folder):
        assert outcome.kind == "OSError"
        assert "cannot be written: I/O error: No space left on device" in outcome.message
    ranks(2).run(load, folder)


def test_folders_that_nodes_do_not_share_are_an_error_of_all(ranks, tmp_path):
    for outcome in ranks(2).outcomes(fail_to_see, tmp_path):
        assert outcome.kind == "OSError"
        assert "must be on a file system that all nodes share" in outcome.message
    assert not list(tmp_path.glob("*/manifest.json"))
