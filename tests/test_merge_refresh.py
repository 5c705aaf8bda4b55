"""`spectral-ds merge --refresh`: block by block, on what merged blocks make of inputs."""

import gc
import shutil

import numpy as np
import pytest
import torch
from merged import (
    CLASSES,
    LENGTH,
    LLAMA,
    LOOK,
    Inputs,
    assert_close,
    filtered,
    lora,
    merge,
    perturbed,
    tensors,
    token_pieces,
    write_models,
    write_tokenizer,
)
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from spectral_ds.cli import main
from spectral_ds.cli.merge import looking, refresh
from spectral_ds.cli.merge.adapter import Adapter
from spectral_ds.cli.merge.folder import Folder
from spectral_ds.cli.merge.refresh import Refresh, look_by_blocks
from spectral_ds.cli.merge.skeleton import Skeleton
from spectral_ds.coactivation import random_batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("merge"))


def refreshed(folder, keep, learn, mu, rest, scale):
    """A refresh of tiny Llamas by its definition: a model is put together for each block."""
    base, tuned, merged = (
        LlamaForCausalLM.from_pretrained(folder / name) for name in ("base", "tuned", "tuned")
    )
    before, after = base.state_dict(), tuned.state_dict()

    def put(names, graphs):
        state = merged.state_dict()
        for name in names:
            old = before[name].double().numpy()
            change = after[name].double().numpy() - old
            if graphs is None or name.removesuffix(".weight") not in graphs[0].vectors:
                new = old + rest * change
            else:
                r, t = (each.graph(name.removesuffix(".weight")) for each in graphs)
                new = filtered(old, [change], r, [t], mu)
            state[name].copy_(torch.from_numpy(old + scale * (new - old)))

    put([name for name in before if "layers." not in name and "lm_head" not in name], None)
    blocks = merged.model.layers
    for number, own in enumerate(blocks):
        graphs = []
        for model, pieces in ((base, keep), (tuned, learn)):
            blocks[number] = model.model.layers[number]
            graphs.append(Inputs(merged, pieces))
            blocks[number] = own
        put([name for name in before if f"layers.{number}." in name], graphs)
    put(["lm_head.weight"], [Inputs(merged, keep), Inputs(merged, learn)])
    return {name: each.double().numpy() for name, each in merged.state_dict().items()}


def test_a_refresh_looks_at_what_merged_blocks_make_of_inputs(folder, tmp_path):
    own = folder / "llama"
    words = ["--keep", folder / "keep.txt", "--learn", folder / "first.txt", *LOOK]
    settings = ["--mu", "0.8", "--rest", "0.5", "--scale", "0.7"]
    merge(own, own / "tuned", *words, *settings, "--refresh", "--out", tmp_path / "out")
    pieces = [token_pieces(folder / name, LENGTH) for name in ("keep.txt", "first.txt")]
    expected = refreshed(own, *pieces, 0.8, 0.5, 0.7)
    assert_close(tensors(tmp_path / "out"), expected, 1e-3)
    merge(own, own / "tuned", *words, *settings, "--out", tmp_path / "once")
    once = tensors(tmp_path / "once")
    name = "model.layers.1.mlp.down_proj.weight"
    far = np.abs(once[name] - expected[name]).max() / np.abs(expected[name]).max()
    assert far > 1e-2  # it would be seen if statistics were those of the unmerged models


@pytest.mark.parametrize("kind", ["gpt2", "classifier", "mixtral"])
def test_a_refresh_goes_through_blocks_of_any_kind(folder, tmp_path, kind):
    own = folder / kind
    source = "generated" if kind == "gpt2" else "random"
    words = ["--keep", source, "--samples", "16", "--length", "8"]
    report = merge(
        own, own / "tuned", own / "other", *words, "--refresh", "--out", tmp_path / "out"
    )
    assert report["filtered"] > 0
    assert report["unseen"] == []


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "bert", "classifier", "mixtral"])
def test_block_by_block_a_model_has_the_graphs_of_all_at_once(folder, kind):
    path, amount = Folder(str(folder / kind / "tuned")), looking.Amount(16, LENGTH, 999)
    model = looking.load_whole(path, path)
    batches = random_batches(model, amount.samples, amount.length, 0)
    found = look_by_blocks(path, batches, amount, "--keep random")
    expected = looking.look(model, batches, amount, "keep random")
    assert found.leaders == expected.leaders
    assert found.spectra.keys() == expected.spectra.keys()
    for name, spectra in expected.spectra.items():
        for one, other in zip(found.spectra[name], spectra, strict=True):
            assert (one is None) == (other is None), name
            if other is not None:
                assert np.allclose(one.matrix(), other.matrix(), atol=1e-4), name


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "bert", "mixtral"])
def test_a_skeleton_that_is_filled_is_the_model(folder, kind):
    path = folder / kind / "tuned"
    whole = CLASSES[kind].from_pretrained(path).eval()
    skeleton = Skeleton(Folder(str(path)))
    parameters = skeleton.architecture.parameters
    assert all(parameter.is_meta for parameter in parameters.values())
    skeleton.fill(parameters)
    ids = torch.arange(2, 10)[None]
    with torch.no_grad():
        found, expected = (model(input_ids=ids).logits for model in (skeleton.model, whole))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # weights lie elsewhere
    found = dict(skeleton.model.named_parameters())
    assert {n: p.shape for n, p in found.items()} == {
        n: p.shape for n, p in whole.named_parameters()
    }
    skeleton.release(skeleton.inside(""))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_an_adapter_is_refreshed_like_the_whole_model_it_makes(folder, tmp_path):
    own = folder / "llama"
    model = LlamaForCausalLM.from_pretrained(own / "base")
    lora(tmp_path, model, ["q_proj", "down_proj"], "CAUSAL_LM")
    words = ["--keep", folder / "keep.txt", "--learn", folder / "first.txt", *LOOK, "--refresh"]
    for name in ("adapter", "whole"):
        merge(own, tmp_path / name, *words, "--out", tmp_path / f"of {name}")
    assert_close(tensors(tmp_path / "of adapter"), tensors(tmp_path / "of whole"), 1e-4)


@pytest.mark.parametrize(("kind", "targets"), [("llama", ["q_proj"]), ("gpt2", ["c_attn"])])
def test_an_adapter_that_does_not_fit_is_looked_at_block_by_block(
    folder, tmp_path, monkeypatch, kind, targets
):
    own = folder / kind
    lora(tmp_path, CLASSES[kind].from_pretrained(own / "base"), targets, "CAUSAL_LM",
         fan_in_fan_out=kind == "gpt2")  # fmt: skip
    words = ["--keep", folder / "keep.txt", "--learn", folder / "first.txt", *LOOK, "--out"]
    merge(own, tmp_path / "adapter", *words, tmp_path / "memory")
    statistics = tmp_path / "memory" / "statistics" / "keep.safetensors"
    words = ["--keep", statistics, *words[2:]]
    monkeypatch.setattr(looking, "free_memory", lambda: 0)
    monkeypatch.setattr(Adapter, "whole_model", None)
    merge(own, tmp_path / "adapter", *words, tmp_path / "blocks")
    one, other = (tensors(tmp_path / name / "statistics") for name in ("memory", "blocks"))
    assert_close(tensors(tmp_path / "blocks"), tensors(tmp_path / "memory"), 1e-4)
    values = [name for name in one if name.startswith(("model", "transformer"))]
    assert values
    assert all(np.allclose(other[n], one[n], atol=1e-4) for n in values if n.endswith("/values"))


def bytes_of_parameters():
    """Of all that are alive and have memory."""
    alive = {id(p): p for p in gc.get_objects() if type(p) is torch.nn.Parameter}
    return sum(p.numel() * p.element_size() for p in alive.values() if not p.is_meta)


def test_a_refresh_holds_a_block_of_each_model_and_what_is_outside(
    folder, tmp_path, monkeypatch, capsys
):
    torch.manual_seed(0)
    config = LlamaConfig(**{**LLAMA, "num_hidden_layers": 12}, max_position_embeddings=32)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    perturbed(model, 1).save_pretrained(tmp_path / "tuned")
    block = sum(p.numel() for p in model.model.layers[0].parameters()) * 4
    head = model.lm_head.weight.numel() * 4
    around = sum(p.numel() for n, p in model.named_parameters() if "layers." not in n) * 4
    del model
    gc.collect()
    before, seen = bytes_of_parameters(), []
    call = Refresh._call

    def watched(self, *given):
        seen.append(bytes_of_parameters() - before)
        return call(self, *given)

    monkeypatch.setattr(Refresh, "_call", watched)
    monkeypatch.setattr(refresh, "free_memory", lambda: around + 2 * block)
    words = ["--keep", folder / "keep.txt", "--learn", folder / "first.txt", "--samples", "4"]
    merge(tmp_path, tmp_path / "tuned", *words, "--refresh", "--out", tmp_path / "out")
    assert len(seen) >= 12 * 4
    assert max(seen) == max(around, around - head + 2 * block)
    monkeypatch.setattr(refresh, "free_memory", lambda: around + 2 * block - 1)
    shutil.rmtree(tmp_path / "out")
    words = [tmp_path / "base", tmp_path / "tuned", *words, "--refresh", "--out", tmp_path / "out"]
    capsys.readouterr()
    assert main(["merge", *map(str, words)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--refresh: one block of each model" in line
