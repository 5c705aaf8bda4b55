"""Files of the plugin's state that cannot be used are named on all ranks, and change nothing."""

import json
import shutil

import pytest
from checkpoints import SAVED_AFTER, STATEFUL, start


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "spectral_ds"
    ranks(2).run(save, folder)
    return folder


def save(folder):
    training = start("zero2")
    for index in range(SAVED_AFTER):
        training.step(index)
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
        lambda f: (f / "manifest.json").write_text('{"version": 2'),
        "manifest.json cannot be read",
    ),
    "other version": (
        lambda f: change_manifest(f, "version", lambda v: v + 1),
        "is of version 3",
    ),
    "file without checksum": (
        lambda f: change_manifest(f, "files", lambda files: [{"name": files[0]["name"]}]),
        "must have name, bytes and sha256",
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
    "no files": (lambda f: change_manifest(f, "files", lambda files: []), "lacks the edges"),
    "unreadable file": (make_unreadable, "safetensors cannot be read: "),
    "unreadable manifest": (
        lambda f: ((f / "manifest.json").unlink(), (f / "manifest.json").mkdir()),
        "manifest.json cannot be read: ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_used_is_named_on_every_rank(ranks, tmp_path, saved, damage):
    folder = tmp_path / "spectral_ds"
    shutil.copytree(saved, folder)
    harm, message = DAMAGES[damage]
    harm(folder)
    for outcome in ranks(2).outcomes(load_damaged, folder, True):
        assert outcome.kind == "CheckpointError"
        assert message in outcome.message
    assert ranks(2).run(load_damaged, folder, False) == [True, True]


def load_damaged(folder, strict):
    training = start("zero2", section={**STATEFUL, "checkpoint": {"strict": strict}})
    (stage,) = training.plugin.stages
    graph = stage.graph
    try:
        training.plugin.load(folder)
        training.step()
        return stage.graph is not graph
    finally:
        training.close()
