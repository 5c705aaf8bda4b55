"""`spectral-ds merge` against dense float64 numpy: architectures, ranks, several models, files."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from merged import (
    CLASSES,
    WORDS,
    Expected,
    assert_close,
    merge,
    perturbed,
    refusal,
    tensors,
    token_pieces,
    write_models,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertForMaskedLM, BertForSequenceClassification

from spectral_ds.cli import main
from spectral_ds.cli.merge import looking

LENGTH = 8
# All that there is, and every direction of it.
LOOK = ["--samples", "999", "--length", str(LENGTH)]
# Behind a norm both graphs may lack one direction, up to rounding in float32: where there is
# something to learn, the one by the other is less exact there, by how much depends on the CPU.
TOLERANCE = {False: 1e-5, True: 1e-3}
TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("merge"), CLASSES)


@pytest.fixture(scope="module")
def kept(folder, tmp_path_factory):
    """The folder of a merge of Llamas with something to keep."""
    own, out = folder / "llama", tmp_path_factory.mktemp("kept")
    merge(own, own / "tuned", "--keep", folder / "keep.txt", *LOOK, "--out", out)
    return out


@pytest.fixture(scope="module")
def learned(folder, tmp_path_factory):
    """The folder and the report of a merge of Mixtrals with something to keep and to learn."""
    own, out = folder / "mixtral", tmp_path_factory.mktemp("learned")
    words = ["--keep", folder / "keep.txt", "--learn", folder / "first.txt", *LOOK]
    return out, merge(own, own / "tuned", *words, "--out", out)


def load(path, kind):
    if kind == "classifier":
        is_base = path.name == "base"
        return (BertForMaskedLM if is_base else BertForSequenceClassification).from_pretrained(path)
    return CLASSES[kind].from_pretrained(path)


def expected_of(folder, kind, names=("tuned",), learn=(None,), **settings):
    """What must come of merging models of a kind."""
    own = folder / kind
    keep = token_pieces(folder / "keep.txt", LENGTH)
    learned = [
        None if text is None else (load(own / name, kind), token_pieces(folder / text, LENGTH))
        for name, text in zip(names, learn, strict=True)
    ]
    expected = Expected(load(own / "base", kind), keep, learned, **settings)
    found = expected.tensors(tensors(own / "base"), [tensors(own / name) for name in names], TURNED)
    return found, expected.activity


KINDS = [*(kind for kind in CLASSES if kind != "bert"), "classifier"]


@pytest.mark.parametrize("learn", [None, "first.txt"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_is_the_filter_of_the_change(folder, tmp_path, kind, learn):
    words = ["--learn", folder / learn] if learn else []
    report = merge(
        folder / kind, folder / kind / "tuned", "--out", tmp_path / "out",
        "--keep", folder / "keep.txt", "--mu", "0.7", "--rest", "0.5", *LOOK, *words,
    )  # fmt: skip
    expected, activity = expected_of(folder, kind, learn=(learn,), mu=0.7, rest=0.5)
    assert_close(tensors(tmp_path / "out"), expected, TOLERANCE[bool(learn)], activity)
    assert report["filtered"] + report["scaled"] + len(report["taken"]) == len(expected)
    assert report["unseen"] == report["unlearned"] == report["unknown"] == []
    load(tmp_path / "out", kind)


def test_conversations_are_learned_by_the_chat_template(folder, tmp_path, capsys):
    own = folder / "llama"
    texts = [line.split() for line in (folder / "first.txt").read_text().splitlines()]
    template = "{% for message in messages %}{{ message['content'] }} [END] {% endfor %}"
    shutil.copytree(own / "tuned", tmp_path / "tuned")
    (tmp_path / "tuned" / "chat_template.jinja").write_text(template)
    rows = [
        [{"role": "user", "content": " ".join(words[:4])},
         {"role": "assistant", "content": " ".join(words[4:])}]
        for words in texts
    ]  # fmt: skip
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": r}) + "\n" for r in rows))
    same = (" ".join([*words[:4], "[END]", *words[4:], "[END]"]) for words in texts)
    (tmp_path / "same.txt").write_text("\n".join(same))
    words = ["--keep", folder / "keep.txt", *LOOK, "--learn"]
    for name in ("chat.jsonl", "same.txt"):
        merge(own, tmp_path / "tuned", *words, tmp_path / name, "--out", tmp_path / f"{name}.out")
    chat, same = (tensors(tmp_path / f"{name}.out") for name in ("chat.jsonl", "same.txt"))
    assert all(np.array_equal(chat[name], same[name]) for name in same)
    assert (tmp_path / "chat.jsonl.out" / "chat_template.jinja").read_text() == template
    line = refusal(
        capsys, own / "base", own / "tuned", *words, tmp_path / "chat.jsonl",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert f"chat.jsonl: line 1 is a conversation, and the tokenizer of {own / 'tuned'} has" in line


def test_a_head_that_only_the_tuned_model_has_is_taken_whole(folder, tmp_path):
    own = folder / "classifier"
    report = merge(own, own / "tuned", "--out", tmp_path / "out", *LOOK)
    head = {"classifier.weight", "classifier.bias"}
    assert head <= set(report["taken"])
    found, tuned = tensors(tmp_path / "out"), tensors(own / "tuned")
    for name in head:
        assert np.array_equal(found[name], tuned[name])
    assert all(name.startswith("cls.") for name in report["left_out"][str(own / "base")])
    assert load(tmp_path / "out", "classifier").config.num_labels == 3


@pytest.mark.parametrize("who", [("tuned",), ("base",), ("base", "tuned")])
def test_a_tied_head_that_a_file_has_too_is_the_embedding(folder, tmp_path, who):
    own = folder / "tied"
    for name in ("base", "tuned"):
        shutil.copytree(own / name, tmp_path / name)
    for name in who:
        file = tmp_path / name / "model.safetensors"
        held = load_file(file)
        held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
        save_file(held, file, {"format": "pt"})
    words = ["--keep", "random", "--samples", "4", "--length", "8", "--rest", "0.5", "--out"]
    report = merge(tmp_path, tmp_path / "tuned", *words, tmp_path / "out")
    assert report["taken"] == report["unknown"] == []
    assert report["left_out"] == {}
    found, before, after = (tensors(tmp_path / name) for name in ("out", "base", "tuned"))
    assert found.keys() == after.keys()
    name = "model.embed_tokens.weight"
    np.testing.assert_allclose(found[name], (before[name] + after[name]) / 2, atol=1e-6)
    np.testing.assert_array_equal(found.get("lm_head.weight", found[name]), found[name])


def test_a_base_without_prefix_gives_the_same(folder, tmp_path):
    own = folder / "classifier"
    encoder = BertForMaskedLM.from_pretrained(own / "base").bert
    encoder.save_pretrained(tmp_path / "base")
    assert any(name.startswith("encoder.") for name in tensors(tmp_path / "base"))
    words = ["--keep", folder / "keep.txt", *LOOK, "--out"]
    merge(own, own / "tuned", *words, tmp_path / "one")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(own / "base" / name, tmp_path / "base")
    merge(tmp_path, own / "tuned", *words, tmp_path / "other")
    assert_close(tensors(tmp_path / "other"), tensors(tmp_path / "one"), 1e-6)


@pytest.mark.parametrize(("kind", "rank"), [("llama", 4), ("classifier", 5)])
def test_few_directions_count_exactly_and_the_others_by_their_mean(folder, tmp_path, kind, rank):
    merge(
        folder / kind, folder / kind / "tuned", "--out", tmp_path / "out", "--rank", rank,
        "--keep", folder / "keep.txt", "--learn", folder / "first.txt", *LOOK,
    )  # fmt: skip
    expected, activity = expected_of(folder, kind, learn=("first.txt",), rank=rank)
    assert_close(tensors(tmp_path / "out"), expected, TOLERANCE[bool(activity)], activity)


def test_a_sketch_of_few_inputs_is_exact(folder, tmp_path):
    # 24 inputs of down_proj and a rank of 2: a sketch of 10 columns, and 8 vectors.
    (tmp_path / "short.txt").write_text(" ".join(WORDS[:8]) + "\n")
    own = folder / "llama"
    merge(
        own, own / "tuned", "--out", tmp_path / "out", "--rank", "2", *LOOK,
        "--keep", tmp_path / "short.txt",
    )  # fmt: skip
    expected = Expected(
        load(own / "base", "llama"), token_pieces(tmp_path / "short.txt", LENGTH), rank=2
    ).tensors(tensors(own / "base"), [tensors(own / "tuned")])
    assert_close(tensors(tmp_path / "out"), expected, 1e-4)


@pytest.mark.parametrize("learn", [(), ("first.txt",), ("first.txt", "second.txt")])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_several_models_are_merged_jointly(folder, tmp_path, kind, learn):
    own = folder / kind
    words = ["--learn", *(folder / each for each in learn)] if learn else []
    report = merge(
        own, own / "tuned", own / "other", "--out", tmp_path / "out", "--mu", "0.4",
        "--keep", folder / "keep.txt", *LOOK, *words,
    )  # fmt: skip
    both = {0: (None, None), 1: learn * 2, 2: learn}[len(learn)]
    expected, activity = expected_of(folder, kind, ("tuned", "other"), both, mu=0.4)
    assert_close(tensors(tmp_path / "out"), expected, TOLERANCE[bool(activity)], activity)
    assert report["blind"] == []


def test_nothing_to_keep_and_all_of_the_rest_is_the_average(folder, tmp_path):
    own = folder / "llama"
    words = ["--mu", "0", "--rest", "1", "--samples", "4", "--out", tmp_path / "out"]
    merge(own, own / "tuned", own / "other", *words)
    one, other = tensors(own / "tuned"), tensors(own / "other")
    assert_close(
        tensors(tmp_path / "out"), {name: (one[name] + other[name]) / 2 for name in one}, 1e-6
    )


def test_of_several_heads_the_first_is_taken_and_named(folder, tmp_path):
    own = folder / "classifier"
    report = merge(own, own / "tuned", own / "other", "--out", tmp_path / "out", *LOOK)
    first = tensors(own / "tuned")["classifier.weight"]
    assert np.array_equal(tensors(tmp_path / "out")["classifier.weight"], first)
    assert "classifier.weight" in report["taken"]


def test_small_shards_hold_the_same_and_can_be_loaded(folder, kept, tmp_path):
    own = folder / "llama"
    words = ["--keep", folder / "keep.txt", *LOOK, "--shard-size", "3e-6"]
    merge(own, own / "tuned", *words, "--out", tmp_path / "many")
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(names) > 3
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    one, many = tensors(kept), tensors(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert np.array_equal(loaded["lm_head.weight"].double().numpy(), one["lm_head.weight"])
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "many" / file).read_text() == (own / "tuned" / file).read_text()


def test_the_dtype_of_the_tuned_model_is_kept(folder, kept, tmp_path):
    own = folder / "llama"
    load(own / "tuned", "llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    merge(own, tmp_path / "half", "--out", tmp_path / "out", *LOOK, "--keep", folder / "keep.txt")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {each.dtype for each in found.values()} == {torch.bfloat16}
    found = {name: each.double().numpy() for name, each in found.items()}
    assert_close(found, tensors(kept), 1e-2)


def test_statistics_serve_again(folder, learned, tmp_path):
    own, (out, _) = folder / "mixtral", learned
    written = out / "statistics"
    words = ["--keep", written / "keep.safetensors", "--learn", written / "learn-1.safetensors"]
    merge(own, own / "tuned", "--out", tmp_path / "other", *words)
    one, other = tensors(out), tensors(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_experts_that_no_token_enters_are_named(folder, tmp_path):
    own = folder / "mixtral"
    (tmp_path / "one.txt").write_text(f"{WORDS[3]}\n")
    report = merge(own, own / "tuned", "--out", tmp_path / "out", "--keep", tmp_path / "one.txt")
    assert len(report["unseen"]) == 2 * 2 * 3  # blocks, experts without the token, matrices
    assert all(".experts." in name for name in report["unseen"])


def test_what_training_left_as_it_was_stays(folder, tmp_path):
    own = folder / "llama"
    model = load(own / "base", "llama")
    perturbed(model.model.layers[1], 3).float()
    model.save_pretrained(tmp_path / "tuned")
    report = merge(own, tmp_path / "tuned", "--out", tmp_path / "out", "--samples", "4")
    base, found = tensors(own / "base"), tensors(tmp_path / "out")
    assert report["unchanged"] == sum("layers.1." not in name for name in base)
    assert all(np.array_equal(found[n], base[n]) for n in base if "layers.1." not in n)


def test_a_model_that_does_not_fit_into_memory_is_called_from_the_disk(
    folder, kept, tmp_path, monkeypatch
):
    own = folder / "llama"
    words = ["--keep", folder / "keep.txt", *LOOK, "--out"]
    seen = []
    calibrate = looking.calibrate

    def watched(model, *arguments):
        seen.append({parameter.device.type for parameter in model.parameters()})
        return calibrate(model, *arguments)

    monkeypatch.setattr(looking, "calibrate", watched)
    monkeypatch.setattr(looking, "free_memory", lambda: 18_000)
    merge(own, own / "tuned", *words, tmp_path / "disk")
    assert seen == [{"cpu", "meta"}]
    assert_close(tensors(tmp_path / "disk"), tensors(kept), 1e-6)


def test_experts_that_lie_in_one_tensor_are_the_same(folder, learned, tmp_path, capsys):
    tiny.skip_without_stacked_experts()
    own, (out, other) = folder / "mixtral", learned
    for name in ("base", "tuned"):
        load(own / name, "mixtral").save_pretrained(tmp_path / name, save_original_format=False)
    shutil.copytree(own / "base", tmp_path / "base", dirs_exist_ok=True, ignore=only_tokenizer)
    words = ["--keep", folder / "keep.txt", "--learn", folder / "first.txt", *LOOK, "--out"]
    one = merge(tmp_path, tmp_path / "tuned", *words, tmp_path / "one")
    stacked = tensors(tmp_path / "one")["model.layers.0.mlp.experts.gate_up_proj"]
    assert stacked.shape == (4, 48, 16)
    assert one["filtered"] == other["filtered"] - 2 * 4  # w1 and w3 of each expert are one matrix
    found, expected = (
        {n: p.double().numpy() for n, p in load(path, "mixtral").state_dict().items()}
        for path in (tmp_path / "one", out)
    )
    assert_close(found, expected, 1e-6)
    status = main(["merge", *map(str, [own / "base", tmp_path / "tuned", "--out", tmp_path / "x"])])
    assert status == 2
    assert "stores it in other parts" in capsys.readouterr().err


def only_tokenizer(_, names):
    return [name for name in names if not name.startswith("token")]
