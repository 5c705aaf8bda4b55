"""`spectral-ds merge`: resumed, refused, and of adapters."""

import json
import resource
import shutil

import numpy as np
import peft
import pytest
import torch
from commands import run
from merged import (
    CLASSES,
    CONFIGS,
    LOOK,
    VOCABULARY,
    assert_close,
    lora,
    merge,
    perturbed,
    tensors,
    write_models,
    write_tokenizer,
)
from peft import LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from spectral_ds import files
from spectral_ds.cli import main
from spectral_ds.cli.merge import job, output
from spectral_ds.cli.merge.adapter import Adapter
from spectral_ds.cli.merge.folder import Folder
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


def refusal(capsys, *words):
    """The one line of a merge that is refused."""
    capsys.readouterr()
    assert main(["merge", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    return line


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
        (
            ["{l}/base", "{l}/tuned", "--scale", "0.5", "--sweep"],
            "--scale 0.5: --sweep judges whole changes",
        ),
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
    assert message in refusal(capsys, *words, "--out", tmp_path / "out")


def test_statistics_of_another_model_are_refused(folder, tmp_path, capsys):
    own, other = folder / "llama", folder / "gpt2"
    merge(own, own / "tuned", "--out", tmp_path / "one", "--samples", "4")
    line = refusal(
        capsys, other / "base", other / "tuned", "--out", tmp_path / "out",
        "--keep", tmp_path / "one" / "statistics" / "keep.safetensors",
    )  # fmt: skip
    assert "keep.safetensors: is of another model" in line


@pytest.mark.parametrize(
    ("kind", "targets", "task", "settings"),
    [
        ("llama", ["q_proj", "down_proj"], "CAUSAL_LM", {}),
        ("llama", ["o_proj"], "CAUSAL_LM", {"use_dora": True}),
        ("llama", ["embed_tokens", "q_proj"], "CAUSAL_LM", {}),
        ("gpt2", ["c_attn"], "CAUSAL_LM", {"fan_in_fan_out": True}),
        ("classifier", ["query", "dense"], "SEQ_CLS", {}),
        ("classifier", ["query", "dense"], "SEQ_CLS", {"bias": "all"}),
    ],
)
def test_an_adapter_is_merged_like_the_whole_model_it_makes(
    folder, tmp_path, kind, targets, task, settings
):
    own = folder / kind
    if kind == "classifier":
        model = BertForSequenceClassification.from_pretrained(own / "base", num_labels=3)
        # The pooler is new in the classifier, like its head; peft has it trained only if told to.
        settings = settings | {
            "modules_to_save": ["pooler", "classifier"], "exclude_modules": r".*pooler.*",
        }  # fmt: skip
    else:
        model = CLASSES[kind].from_pretrained(own / "base")
    lora(tmp_path, model, targets, task, **settings)
    words = ["--keep", folder / "keep.txt", "--learn", folder / "first.txt", *LOOK, "--out"]
    one = merge(own, tmp_path / "adapter", *words, tmp_path / "one")
    other = merge(own, tmp_path / "whole", *words, tmp_path / "other")
    assert_close(tensors(tmp_path / "one"), tensors(tmp_path / "other"), 1e-4)
    assert one["filtered"] == other["filtered"] > 0
    assert (tmp_path / "one" / "tokenizer.json").exists()
    kinds = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("one", "other")]
    assert kinds[0]["architectures"] == kinds[1]["architectures"]
    if task == "SEQ_CLS":
        loaded = BertForSequenceClassification.from_pretrained(tmp_path / "one")
        assert loaded.classifier.weight.shape[0] == 3


def test_an_adapter_of_a_tied_model_may_have_saved_its_embeddings(folder, tmp_path):
    settings = CONFIGS["llama"].to_dict() | {"tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    adapted.merge_and_unload().save_pretrained(tmp_path / "whole")
    words = ["--keep", "random", *LOOK, "--out"]
    merge(tmp_path, tmp_path / "adapter", *words, tmp_path / "one")
    merge(tmp_path, tmp_path / "whole", *words, tmp_path / "other")
    assert_close(tensors(tmp_path / "one"), tensors(tmp_path / "other"), 1e-4)


@pytest.mark.parametrize(
    ("targets", "saved", "others"),
    [
        (["c_attn"], ["wte"], "transformer.wte.weight is tied to lm_head.weight"),
        (["c_attn"], ["lm_head"], "lm_head.weight is tied to transformer.wte.weight"),
        (["c_attn", "wte"], None, "transformer.wte.weight is tied to lm_head.weight"),
    ],
)
def test_an_adapter_that_changes_one_of_tied_parameters_is_refused(
    folder, tmp_path, capsys, targets, saved, others
):
    base = folder / "gpt2" / "base"
    config = LoraConfig(
        r=2, target_modules=targets, modules_to_save=saved, init_lora_weights=False,
        fan_in_fan_out=True,
    )  # fmt: skip
    get_peft_model(GPT2LMHeadModel.from_pretrained(base), config).save_pretrained(tmp_path)
    line = refusal(capsys, base, tmp_path, "--out", tmp_path / "out")
    assert others in line
    assert "merge it with peft first" in line


def test_an_adapter_with_biases_of_its_own_is_refused(folder, tmp_path, capsys):
    model = LlamaForCausalLM(LlamaConfig(**CONFIGS["llama"].to_dict() | {"attention_bias": True}))
    model.save_pretrained(tmp_path / "base")
    lora(tmp_path, model, ["q_proj"], "CAUSAL_LM", lora_bias=True)
    line = refusal(capsys, tmp_path / "base", tmp_path / "adapter", "--out", tmp_path / "out")
    assert "has lora_bias; merge it with peft first" in line


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda"])
def test_an_adapter_that_has_changed_the_base_weights_is_refused(folder, tmp_path, capsys, init):
    base = folder / "llama" / "base"
    config = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": init}))
    line = refusal(capsys, base, tmp_path, "--out", tmp_path / "out")
    assert f"init_lora_weights = '{init}' has changed the base weights" in line
    known = "path_initial_model_for_weight_conversion" if init == "corda" else "merge_and_unload()"
    assert known in line


def test_a_new_head_of_an_adapter_has_the_dtype_of_weights(folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder / "gpt2" / "base", base)
    weights = load_file(base / "model.safetensors")
    mask = {"transformer.a_mask": torch.ones(2, 2, dtype=torch.bool)}
    save_file(mask | weights, base / "model.safetensors", {"format": "pt"})
    config = LoraConfig(r=2, target_modules=["c_attn"], task_type="SEQ_CLS", fan_in_fan_out=True)
    adapted = get_peft_model(GPT2ForSequenceClassification.from_pretrained(base), config)
    adapted.save_pretrained(tmp_path / "adapter")
    read = Adapter(str(tmp_path / "adapter"), Folder(str(base)))
    assert read.stored["score.weight"].dtype == torch.float32
    head = adapted.base_model.model.score.modules_to_save["default"].weight
    assert torch.equal(read.read("score.weight"), head)


def test_an_adapter_that_has_buffers_is_read_with_them(folder, tmp_path):
    if not hasattr(peft, "DeloraConfig"):
        pytest.skip("this peft has no DeLoRA")
    base = folder / "llama" / "base"
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(base),
        peft.DeloraConfig(r=2, target_modules=["q_proj"], init_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "whole")
    read = Adapter(str(tmp_path / "adapter"), Folder(str(base)))
    for _ in range(2):  # to read changes nothing
        found = {name: read.read(name).double().numpy() for name in read.stored}
        assert_close(found, tensors(tmp_path / "whole"))


def test_an_adapter_has_the_statistics_of_norms(tmp_path):
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=3))
    for buffer in model.buffers():
        buffer.add_(torch.arange(buffer.numel()).view_as(buffer) + 1)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["convolution"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "whole")
    read = Adapter(str(tmp_path / "adapter"), Folder(str(tmp_path / "base")))
    whole = tensors(tmp_path / "whole")
    assert read.stored.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_allclose(read.read(name), value, atol=1e-5)


def test_an_adapter_that_lacks_what_it_is_merged_with_is_refused(folder, tmp_path, capsys):
    base = folder / "llama" / "base"
    config = OFTConfig(oft_block_size=4, target_modules=["q_proj"])
    get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path)
    line = refusal(capsys, base, tmp_path, "--out", tmp_path / "out")
    assert "lacks base_model.model.model.layers.0.self_attn.q_proj.oft_R.rows" in line
    assert "merge it with peft first" in line


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
