"""Files that a graph of activations is made of: what they say counts, and not where they lie."""

import hashlib
import os
import shutil

import activations
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from activations import RATE, CalledByIds, section_of
from cells import Training

import spectral_ds
from spectral_ds.checkpoint import CheckpointError


class Moved(CalledByIds):
    """Some weights are others."""

    def __init__(self):
        super().__init__()
        for name, parameter in self.named_parameters():
            if "down_proj" in name:
                parameter.data.mul_(20)


def attached(section, kind=CalledByIds):
    model = kind()
    return spectral_ds.attach(model, torch.optim.SGD(model.parameters(), lr=RATE), section)


def operators(plugin):
    return {key: plugin.graph.operator(*key) for key in plugin.graph.held.graph_of}


def differ(found, wanted):
    """Whether any operator of the same matrices does."""
    assert found.keys() == wanted.keys()
    return any(not np.array_equal(found[key], wanted[key]) for key in wanted)


def texts_in(folder, seed=7, **edge):
    """A folder with texts and a tokenizer, and a section that reads them."""
    folder.mkdir(exist_ok=True)
    activations.write_texts(folder / "keep.txt", seed)
    activations.words(folder)
    named = {"keep": str(folder / "keep.txt"), "tokenizer": str(folder)}
    return section_of({"rank": 4, **named, **edge})


def statistics_in(folder, seed=7, **edge):
    """The same with statistics of the texts."""
    plugin = attached(texts_in(folder, seed))
    plugin.save_activations(folder / "keep.safetensors")
    plugin.detach()
    return section_of({"rank": 4, "keep": str(folder / "keep.safetensors"), **edge})


KINDS = {"texts": texts_in, "statistics": statistics_in}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_gone_on_with_where_its_files_have_moved(tmp_path, kind):
    plugin = attached(KINDS[kind](tmp_path / "old", learn=str(tmp_path / "old" / "keep.txt"),
                                  tokenizer=str(tmp_path / "old")))  # fmt: skip
    wanted = operators(plugin)
    plugin.save(tmp_path / "state")
    plugin.detach()
    shutil.move(tmp_path / "old", tmp_path / "new")
    name = {"texts": "keep.txt", "statistics": "keep.safetensors"}[kind]
    new = tmp_path / "new"
    edge = {"keep": str(new / name), "learn": str(new / "keep.txt"), "tokenizer": str(new)}
    plugin = attached(section_of({"rank": 4, **edge}), Moved)
    if kind == "texts":
        assert differ(operators(plugin), wanted)
    plugin.load(tmp_path / "state")
    assert not differ(operators(plugin), wanted)
    plugin.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_another_content_under_the_same_name_is_refused_and_both_are_said(tmp_path, kind):
    folder = tmp_path / "inputs"
    section = KINDS[kind](folder)
    path = section["graph"]["edges"][0]["keep"]
    plugin = attached(section)
    old = operators(plugin)
    plugin.save(tmp_path / "state")
    plugin.detach()
    before = sha256(path)
    KINDS[kind](folder, seed=8)
    plugin = attached(section)
    new = operators(plugin)
    with pytest.raises(CheckpointError) as refused:
        plugin.load(tmp_path / "state")
    told = (
        f'spectral_ds.graph.edges[0].keep = "{path}" holds SHA-256 {sha256(path)[:12]}, and the '
        f"checkpoint is of SHA-256 {before[:12]}"
    )
    assert told in str(refused.value)
    assert "tokenizer" not in str(refused.value)
    plugin.detach()
    plugin = attached({**section, "checkpoint": {"strict": False}})
    plugin.load(tmp_path / "state")
    assert not differ(operators(plugin), new)
    assert differ(new, old)
    plugin.detach()


def test_a_file_in_the_place_of_drawn_inputs_is_refused_and_both_are_said(tmp_path):
    plugin = attached(section_of({"rank": 4}))
    plugin.save(tmp_path / "state")
    plugin.detach()
    section = texts_in(tmp_path / "inputs")
    plugin = attached(section)
    content = sha256(tmp_path / "inputs" / "keep.txt")[:12]
    with pytest.raises(CheckpointError, match=f"holds SHA-256 {content}, and .* is of no file"):
        plugin.load(tmp_path / "state")
    plugin.detach()


def test_another_tokenizer_is_refused_where_texts_are_read_and_only_there(tmp_path):
    for kind, is_refused in (("texts", True), ("statistics", False)):
        folder = tmp_path / kind
        section = KINDS[kind](folder, tokenizer=str(folder))
        plugin = attached(section)
        plugin.save(folder / "state")
        plugin.detach()
        settings = folder / "tokenizer_config.json"
        settings.write_text(settings.read_text().replace("?", "w0"))
        plugin = attached(section)
        if is_refused:
            with pytest.raises(CheckpointError, match=r"edges\[0\].tokenizer = .* holds SHA-256"):
                plugin.load(folder / "state")
        else:
            plugin.load(folder / "state")
        plugin.detach()


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


# On ranks


def moved_on_ranks(name, folder):
    """Goes on by the engine's own way of saving, after the texts have moved or changed."""
    rank = torch.distributed.get_rank()
    training = Training(name, texts_on_ranks(folder / "old"), model=CalledByIds)
    wanted = operators(training.plugin)
    dcp.save({"plugin": training.plugin.state_dict()}, checkpoint_id=folder / "dcp")
    training.close()
    told = []
    for place, seed in (("new", 7), ("changed", 8)):
        training = Training(name, texts_on_ranks(folder / place, seed), model=Moved)
        assert differ(operators(training.plugin), wanted)
        state = {"plugin": training.plugin.state_dict()}
        dcp.load(state, checkpoint_id=folder / "dcp")
        try:
            training.plugin.load_state_dict(state["plugin"])
            told.append("differs" if differ(operators(training.plugin), wanted) else "goes on")
        except CheckpointError as error:
            told.append(str(error))
        training.close()
    own = folder / f"of rank {rank}"
    try:
        Training(name, texts_on_ranks(own, 7 + rank, every=True), model=CalledByIds)
    except spectral_ds.SpectralConfigError as error:
        told.append(str(error))
    return told


def texts_on_ranks(folder, seed=7, every=False):
    """Written by rank 0, or by every rank for itself, under a name that all have."""
    if every:
        folder.mkdir()
        os.chdir(folder)
        texts_in(folder, seed)
        named = {"keep": "keep.txt", "tokenizer": str(folder.parent / "old")}
        return section_of({"rank": 4, **named})
    if torch.distributed.get_rank() == 0:
        texts_in(folder, seed)
    torch.distributed.barrier()
    named = {"keep": str(folder / "keep.txt"), "tokenizer": str(folder)}
    return section_of({"rank": 4, **named})


def test_ranks_go_on_alike_and_refuse_alike(ranks, tmp_path):
    of_ranks = ranks(2).run(moved_on_ranks, "fsdp2", tmp_path)
    assert of_ranks[0] == of_ranks[1]
    goes_on, refused, apart = of_ranks[0]
    assert goes_on == "goes on"
    contents = [sha256(tmp_path / place / "keep.txt")[:12] for place in ("changed", "old")]
    assert f"holds SHA-256 {contents[0]}, and the checkpoint is of SHA-256 {contents[1]}" in refused
    contents = [sha256(tmp_path / f"of rank {rank}" / "keep.txt")[:12] for rank in (0, 1)]
    assert (
        f'spectral_ds.graph.edges[0].keep = "keep.txt": holds SHA-256 {contents[0]} on rank 0 and '
        f"SHA-256 {contents[1]} on rank 1" in apart
    )
