"""`spectral-ds merge`: gone on with, and refused."""

import json
import resource
import shutil

import numpy as np
import pytest
import torch
from commands import run
from merged import LOOK, VOCABULARY, merge, perturbed, refusal, tensors, write_models
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from spectral_ds import files
from spectral_ds.cli import main
from spectral_ds.cli.merge import job, output
from spectral_ds.coactivation import Moments, file

FEW = ["--samples", "4", "--length", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("merge"), ("llama", "gpt2", "bert"))


class Killed(BaseException):
    pass


def test_a_merge_that_was_killed_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    own = folder / "llama"
    words = ["--keep", folder / "keep.txt", "--learn", folder / "first.txt", *LOOK,
             "--shard-size", "3e-6", "--out"]  # fmt: skip
    whole = merge(own, own / "tuned", *words, tmp_path / "whole")
    out = tmp_path / "out"
    write, written = output.Output.write_shard, []

    def killed(self, shard, held, found):
        if len(written) == 2:
            (self.folder / f"{shard.file}.unfinished").write_bytes(b"half")
            raise Killed
        written.append(shard.file)
        write(self, shard, held, found)

    with monkeypatch.context() as patched:
        patched.setattr(output.Output, "write_shard", killed)
        with pytest.raises(Killed):
            merge(own, own / "tuned", *words, out)
    assert not (out / "model.safetensors.index.json").exists()
    before = {name: (out / name).stat().st_mtime_ns for name in written}
    with monkeypatch.context() as patched:  # statistics are not taken again
        patched.setattr(job, "look", None)
        report = merge(own, own / "tuned", *words, out)
    assert report == whole
    assert {name: (out / name).stat().st_mtime_ns for name in written} == before
    found, expected = tensors(out), tensors(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    assert not list(out.rglob("*.unfinished"))
    with monkeypatch.context() as patched:  # and what is complete is left alone
        patched.setattr(job.Merging, "write", None)
        assert merge(own, own / "tuned", *words, out) == whole


@pytest.mark.parametrize("suffix", ["model.safetensors", "statistics/"])
def test_a_full_disk_is_one_line_and_the_merge_goes_on_when_there_is_room(
    folder, tmp_path, capsys, monkeypatch, suffix
):
    own, write = folder / "bert", files.write_whole
    words = ["merge", own / "base", own / "tuned", *FEW, "--out", tmp_path / "out"]

    def on_a_full_disk(path, write_to):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = 100 if suffix in str(path) else limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            write(path, write_to)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patched:
        for module in (output, file):
            patched.setattr(module, "write_whole", on_a_full_disk)
        assert main([str(word) for word in words]) == 2
    [line] = [each for each in capsys.readouterr().err.splitlines() if "spectral-ds: " in each]
    assert f"{tmp_path / 'out' / suffix}" in line
    assert "File too large" in line
    assert not list(tmp_path.rglob("*.unfinished"))
    assert main([str(word) for word in words]) == 0


@pytest.mark.parametrize(("kind", "best"), [("llama", "generated"), ("bert", "random")])
def test_what_is_kept_by_default_depends_on_the_kind_of_model(folder, tmp_path, kind, best):
    own = folder / kind
    merge(own, own / "tuned", *FEW, "--out", tmp_path / "default")
    merge(own, own / "tuned", *FEW, "--keep", best, "--out", tmp_path / "named")
    found, expected = tensors(tmp_path / "default"), tensors(tmp_path / "named")
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    # It is the same merge: the folder can be gone on with either way.
    merge(own, own / "tuned", *FEW, "--out", tmp_path / "named")


@pytest.mark.parametrize(("kind", "learn"), [("llama", []), ("llama", ["keep.txt"]), ("bert", [])])
def test_a_language_model_that_is_to_learn_nothing_is_told_of_it(folder, tmp_path, kind, learn):
    own = folder / kind
    words = ["--learn", *[folder / name for name in learn]] if learn else []
    status, out = run("merge", own / "base", own / "tuned", *words, *FEW, "--out", tmp_path / "x")
    assert status == 0
    assert ("a language model learns too little so" in out) == (kind == "llama" and not learn)


def test_the_scale_is_an_interpolation_after_the_filter(folder, tmp_path):
    own = folder / "llama"
    words = ["--keep", folder / "keep.txt", "--learn", folder / "first.txt", *LOOK, "--out"]
    merge(own, own / "tuned", *words, tmp_path / "whole")
    merge(own, own / "tuned", *words, tmp_path / "part", "--scale", "0.7")
    before, whole, part = map(tensors, (own / "base", tmp_path / "whole", tmp_path / "part"))
    for name, value in before.items():
        change = whole[name] - value
        assert np.abs(change).max() > 0
        np.testing.assert_allclose(part[name] - value, 0.7 * change, atol=1e-6, rtol=0)


def test_a_folder_of_another_merge_is_refused(folder, tmp_path, capsys):
    own = folder / "llama"
    shutil.copytree(own / "tuned", tmp_path / "tuned")
    words = [own / "base", tmp_path / "tuned", "--samples", "4", "--out", tmp_path / "out"]
    assert run("merge", *words)[0] == 0
    assert "with mu = 1.0, not 2.0" in refusal(capsys, *words, "--mu", "2")
    perturbed(LlamaForCausalLM.from_pretrained(own / "tuned"), 8).save_pretrained(
        tmp_path / "tuned"
    )
    assert f"another content of {tmp_path / 'tuned'}" in refusal(capsys, *words)
    line = refusal(capsys, own / "base", own / "tuned", "--out", own / "other")
    assert "is not empty" in line


def test_modules_behind_a_sentence_transformer_are_copied(folder, tmp_path):
    own, tuned = folder / "bert", tmp_path / "tuned"
    shutil.copytree(own / "tuned", tuned)
    for name in ("2_Dense", "onnx"):
        (tuned / name).mkdir()
        save_file({"weight": torch.ones(2, 2)}, tuned / name / "model.safetensors")
    paths = [{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}]
    (tuned / "modules.json").write_text(json.dumps(paths))
    report = merge(own, tuned, *FEW, "--out", tmp_path / "out")
    assert report["copied"] == ["2_Dense/model.safetensors"]
    dense = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
    assert torch.equal(dense["weight"], torch.ones(2, 2))
    assert not (tmp_path / "out" / "onnx").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", "{", "cannot be read as JSON"),
        ("modules.json", "null", "must be a list of modules, each with its path"),
        ("modules.json", '["2_Dense"]', "must be a list of modules, each with its path"),
        ("model.safetensors.index.json", "", "cannot be read as JSON"),
        ("model.safetensors.index.json", "{}", "must hold weight_map, files by tensor"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}', "must hold weight_map"),
    ],
)
def test_small_files_that_cannot_be_read_are_named(
    folder, tmp_path, capsys, file, content, message
):
    own, tuned = folder / "bert", tmp_path / "tuned"
    shutil.copytree(own / "tuned", tuned)
    if "index" in file:
        (tuned / "model.safetensors").unlink()
    (tuned / file).write_text(content)
    line = refusal(capsys, own / "base", tuned, "--out", tmp_path / "out")
    assert f"{tuned / file}: {message}" in line
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_model_of_another_architecture_is_refused(folder, tmp_path, capsys):
    line = refusal(
        capsys, folder / "gpt2" / "base", folder / "llama" / "tuned", "--out", tmp_path / "out"
    )
    assert str(folder / "llama" / "tuned") in line
    assert "no fine-tuned version" in line
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def wrong(folder, tmp_path_factory):
    """Models that cannot be merged with the Llama, and a file without text."""
    path = tmp_path_factory.mktemp("wrong")
    other_shape(path / "wide", intermediate_size=28)
    other_shape(path / "words", vocab_size=len(VOCABULARY) + 1)
    other_shape(path / "shallow", num_hidden_layers=1)
    (path / "bin").mkdir()
    shutil.copy(folder / "llama" / "tuned" / "config.json", path / "bin")
    torch.save({}, path / "bin" / "pytorch_model.bin")
    (path / "empty.txt").write_text("\n")
    return path


def other_shape(path, **changes):
    config = LlamaForCausalLM.config_class(
        vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=24,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(config, name, value)
    LlamaForCausalLM(config).save_pretrained(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{l}/gone", "{l}/tuned"], "gone: no such folder"),
        (["{l}/base", "{w}/wide"], "mlp.down_proj.weight: is (16, 24) in"),
        (["{l}/base", "{w}/words"], "lm_head.weight: is (32, 16) in"),
        (["{l}/base", "{l}/tuned", "{w}/shallow"], "shallow: lacks model.layers.1."),
        (["{l}/base", "{w}/bin"], "holds pytorch_model.bin and no safetensors"),
        (["{l}/base", "{w}"], "holds neither model.safetensors nor"),
        (["{l}/base", "{l}/tuned", "--keep", "gone.txt"], "--keep gone.txt: no such file"),
        (["{l}/base", "{l}/tuned", "--learn", "random"], "--learn random: no such file; allowed"),
        (["{l}/base", "{l}/tuned", "--learn", "a", "b"], "one for each of 1 TUNED"),
        (["{l}/base", "{l}/tuned", "--keep", "none"], "--keep none"),
        (["{l}/base", "{l}/tuned", "--mu", "-1"], "'-1' is not a number from 0 on"),
        (["{l}/base", "{l}/tuned", "--keep", "{w}/empty.txt"], "empty.txt: holds no text"),
        (["{b}/base", "{b}/tuned", "--keep", "generated"], "cannot generate"),
        (["{l}/base", "{l}/tuned", "--keep", "{l}/base/model.safetensors"], "no statistics"),
        (["{l}/base", "{l}/tuned", "--sweep"], "--sweep needs --task FILE"),
        (["{l}/base", "{l}/tuned", "--task", "{w}/empty.txt"], "no effect without --sweep"),
        (["{b}/base", "{b}/tuned", "--sweep", "--task", "{w}/empty.txt", "--general",
          "{w}/empty.txt"], "and this is BertForMaskedLM"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(folder, wrong, tmp_path, capsys, words, message):
    places = {"l": folder / "llama", "b": folder / "bert", "w": wrong}
    words = [word.format(**places) for word in words]
    out = tmp_path / "out"
    assert message in refusal(capsys, *words, "--out", out)
    # The right arguments would be refused there; only statistics that were taken are kept.
    assert not out.exists() or any((out / "statistics").iterdir())


def test_statistics_of_another_model_are_refused(folder, tmp_path, capsys):
    own, other = folder / "llama", folder / "gpt2"
    merge(own, own / "tuned", "--out", tmp_path / "one", "--samples", "4")
    line = refusal(
        capsys, other / "base", other / "tuned", "--out", tmp_path / "out",
        "--keep", tmp_path / "one" / "statistics" / "keep.safetensors",
    )  # fmt: skip
    assert "keep.safetensors: is of another model" in line


def test_the_input_of_a_watched_head_is_seen_at_every_token(folder, tmp_path, monkeypatch):
    counts = []
    add = Moments.add

    def counted(self, vectors, weight, matrix=0):
        counts.append(len(vectors))
        add(self, vectors, weight, matrix)

    monkeypatch.setattr(Moments, "add", counted)
    own = folder / "llama"
    merge(own, own / "tuned", "--out", tmp_path / "out", "--keep", "random", *FEW)
    assert set(counts) == {4 * 8}
