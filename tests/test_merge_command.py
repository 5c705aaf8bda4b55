"""`spectral-ds merge`: resumed, refused, with adapters, refreshed, and as a sweep."""

import csv
import gc
import json
import shutil

import numpy as np
import pytest
import torch
from commands import run
from merged import (
    CLASSES,
    LLAMA,
    VOCABULARY,
    WORDS,
    Expected,
    Inputs,
    assert_close,
    classifiers_of,
    filtered,
    merge,
    perturbed,
    tensors,
    token_pieces,
    write_pair,
    write_texts,
    write_tokenizer,
)
from peft import LoraConfig, get_peft_model
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from spectral_ds.cli import main
from spectral_ds.cli.merge import job, looking, output, refresh
from spectral_ds.cli.merge.adapter import Adapter
from spectral_ds.cli.merge.folder import Folder
from spectral_ds.cli.merge.refresh import Refresh
from spectral_ds.cli.merge.skeleton import Skeleton
from spectral_ds.cli.merge.sweep import INTERPOLATION, Setting, recommended, with_gains
from spectral_ds.coactivation import Moments

LENGTH = 8
LOOK = ["--samples", "999", "--length", str(LENGTH)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("merge")
    for seed, name in enumerate(("keep", "first")):
        write_texts(path / f"{name}.txt", seed)
    write_texts(path / "labelled.tsv", 5, 60, labels=True)
    write_texts(path / "general.txt", 6, 60)
    for kind in ("llama", "gpt2", "bert", "mixtral", "tied"):
        (path / kind).mkdir()
        write_pair(path / kind, kind)
    (path / "classifier").mkdir()
    shutil.copytree(path / "bert" / "base", path / "classifier" / "base")
    classifiers_of(path / "classifier")
    return path


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


def refusal(capsys, *words):
    """The one line of a merge that is refused."""
    capsys.readouterr()
    assert main(["merge", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    return line


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


def test_a_model_of_another_architecture_is_refused(folder, tmp_path, capsys):
    line = refusal(
        capsys, folder / "gpt2" / "base", folder / "llama" / "tuned", "--out", tmp_path / "out"
    )
    assert str(folder / "llama" / "tuned") in line
    assert "no fine-tuned version" in line
    assert not (tmp_path / "out").exists()


def other_shape(path, **changes):
    config = LlamaForCausalLM.config_class(
        vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=24,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(config, name, value)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{l}/gone", "{l}/tuned"], "gone: no such folder"),
        (["{l}/base", "{t}/wide"], "mlp.down_proj.weight: is (16, 24) in"),
        (["{l}/base", "{t}/words"], "lm_head.weight: is (32, 16) in"),
        (["{l}/base", "{l}/tuned", "{t}/shallow"], "shallow: lacks model.layers.1."),
        (["{l}/base", "{t}/bin"], "holds pytorch_model.bin and no safetensors"),
        (["{l}/base", "{t}"], "holds neither model.safetensors nor"),
        (["{l}/base", "{l}/tuned", "--keep", "gone.txt"], "--keep gone.txt: no such file"),
        (["{l}/base", "{l}/tuned", "--learn", "random"], "--learn random: no such file; allowed"),
        (["{l}/base", "{l}/tuned", "--learn", "a", "b"], "one for each of 1 TUNED"),
        (["{l}/base", "{l}/tuned", "--keep", "none"], "--keep none"),
        (["{l}/base", "{l}/tuned", "--mu", "-1"], "'-1' is not a number from 0 on"),
        (["{l}/base", "{l}/tuned", "--keep", "{t}/empty.txt"], "empty.txt: holds no text"),
        (["{b}/base", "{b}/tuned", "--keep", "generated"], "cannot generate"),
        (["{l}/base", "{l}/tuned", "--keep", "{l}/base/model.safetensors"], "no statistics"),
        (["{l}/base", "{l}/tuned", "--sweep"], "--sweep needs --task FILE"),
        (["{l}/base", "{l}/tuned", "--task", "{t}/empty.txt"], "no effect without --sweep"),
        (["{b}/base", "{b}/tuned", "--sweep", "--task", "{t}/empty.txt", "--general",
          "{t}/empty.txt"], "and this is BertForMaskedLM"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(folder, tmp_path, capsys, words, message):
    other_shape(tmp_path / "wide", intermediate_size=28)
    other_shape(tmp_path / "words", vocab_size=len(VOCABULARY) + 1)
    other_shape(tmp_path / "shallow", num_hidden_layers=1)
    (tmp_path / "bin").mkdir()
    shutil.copy(folder / "llama" / "tuned" / "config.json", tmp_path / "bin")
    torch.save({}, tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "empty.txt").write_text("\n")
    places = {"l": folder / "llama", "b": folder / "bert", "t": tmp_path}
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


def lora(path, model, targets, task, **settings):
    """An adapter in `adapter`, the same merged by peft in `whole`."""
    torch.manual_seed(3)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=2, target_modules=targets, task_type=task, init_lora_weights=False, **settings
        ),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    adapted.save_pretrained(path / "adapter")
    adapted.merge_and_unload().save_pretrained(path / "whole")


@pytest.mark.parametrize(
    ("kind", "targets", "task", "settings"),
    [
        ("llama", ["q_proj", "down_proj"], "CAUSAL_LM", {}),
        ("llama", ["o_proj"], "CAUSAL_LM", {"use_dora": True}),
        ("gpt2", ["c_attn"], "CAUSAL_LM", {"fan_in_fan_out": True}),
        ("classifier", ["query", "dense"], "SEQ_CLS", {}),
    ],
)
def test_an_adapter_is_merged_like_the_whole_model_it_makes(
    folder, tmp_path, kind, targets, task, settings
):
    own = folder / kind
    if kind == "classifier":
        model = BertForSequenceClassification.from_pretrained(own / "base", num_labels=3)
        # The pooler is new in the classifier, like its head; peft has it trained only if told to.
        settings = {"modules_to_save": ["pooler", "classifier"], "exclude_modules": r".*pooler.*"}
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


def refreshed(folder, keep, learn, mu, rest):
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
            state[name].copy_(torch.from_numpy(new))

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
    settings = ["--mu", "0.8", "--rest", "0.5"]
    merge(own, own / "tuned", *words, *settings, "--refresh", "--out", tmp_path / "out")
    pieces = [token_pieces(folder / name, LENGTH) for name in ("keep.txt", "first.txt")]
    expected = refreshed(own, *pieces, 0.8, 0.5)
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
    once = merge(own, own / "tuned", own / "other", *words, "--out", tmp_path / "once")
    assert report["filtered"] == once["filtered"]
    assert report["unseen"] == []


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "bert", "mixtral"])
def test_a_skeleton_that_is_filled_is_the_model(folder, kind):
    path = folder / kind / "tuned"
    whole = CLASSES[kind].from_pretrained(path).eval()
    skeleton = Skeleton(Folder(str(path)))
    parameters = skeleton.architecture.parameters
    assert all(parameter.is_meta for parameter in parameters.values())
    skeleton.fill(parameters)
    ids = torch.arange(2, 10)[None]
    assert torch.equal(skeleton.model(input_ids=ids).logits, whole(input_ids=ids).logits)
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


def test_a_refresh_holds_a_block_of_each_model_and_what_is_outside(folder, tmp_path, monkeypatch):
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
    words = ["--keep", folder / "keep.txt", "--learn", folder / "first.txt", "--samples", "4"]
    merge(tmp_path, tmp_path / "tuned", *words, "--refresh", "--out", tmp_path / "out")
    assert len(seen) >= 12 * 4
    assert max(seen) == max(around, around - head + 2 * block)
    monkeypatch.setattr(refresh, "free_memory", lambda: around + 2 * block - 1)
    shutil.rmtree(tmp_path / "out")
    words = [tmp_path / "base", tmp_path / "tuned", *words, "--refresh", "--out", tmp_path / "out"]
    assert main(["merge", *map(str, words)]) == 2


def rows_of(path):
    with (path / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def language_loss(model, path, length):
    """Nats a token on every second text of a file, in float64."""
    total, count = 0.0, 0
    lines = [line.split("\t")[-1] for line in path.read_text().splitlines()]
    for text in lines[1::2]:
        ids = [2 + WORDS.index(word) for word in text.split()]
        for at in range(0, len(ids), length):
            piece = torch.tensor([ids[at : at + length]])
            with torch.no_grad():
                logs = model(input_ids=piece).logits.double().log_softmax(-1)[0]
            total -= float(logs[:-1].gather(1, piece[0, 1:, None]).sum())
            count += piece.shape[1] - 1
    return total / count


def test_a_sweep_shows_the_tuned_model_and_the_base_at_its_ends(folder, tmp_path):
    own = folder / "llama"
    task, general = folder / "labelled.tsv", folder / "general.txt"
    status, out = run(
        "merge", own / "base", own / "tuned", "--out", tmp_path, "--keep", general, *LOOK,
        "--sweep", "--task", task, "--general", general,
    )  # fmt: skip
    assert status == 0
    assert "α = 1" in out
    assert "Recommendation:" in out
    assert (tmp_path / "frontier.png").stat().st_size > 0
    assert not list(tmp_path.glob("*.safetensors"))
    rows = rows_of(tmp_path)
    ends = {row["alpha"]: row for row in rows if row["method"] == INTERPOLATION}
    models = [LlamaForCausalLM.from_pretrained(own / name).eval() for name in ("base", "tuned")]
    for alpha, model in zip(("0.0", "1.0"), models, strict=True):
        assert float(ends[alpha]["task"]) == pytest.approx(
            language_loss(model, task, LENGTH), rel=1e-5
        )
        assert float(ends[alpha]["general"]) == pytest.approx(
            language_loss(model, general, LENGTH), rel=1e-5
        )
    assert float(ends["0.0"]["forgetting"]) == 0
    assert {(row["mu"], row["rest"]) for row in rows if row["mu"]} == {
        (mu, rest) for mu in ("0.3", "1.0", "3.0") for rest in ("0.6", "1.0")
    }


def test_a_setting_of_the_sweep_is_the_model_that_merge_writes(folder, tmp_path):
    own = folder / "llama"
    task, general = folder / "labelled.tsv", folder / "general.txt"
    words = [own / "base", own / "tuned", *LOOK, "--mu", "0.5", "--keep", folder / "keep.txt"]
    judged = ["--sweep", "--task", task, "--general", general]
    assert run("merge", *words, *judged, "--out", tmp_path / "sweep")[0] == 0
    assert run("merge", *words, "--out", tmp_path / "out")[0] == 0
    [row] = [r for r in rows_of(tmp_path / "sweep") if (r["mu"], r["rest"]) == ("0.5", "0.6")]
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert float(row["task"]) == pytest.approx(language_loss(model, task, LENGTH), rel=1e-5)


def test_a_sweep_of_classifiers_counts_labels_and_neighbours(folder, tmp_path):
    own = folder / "classifier"
    status, out = run(
        "merge", own / "base", own / "tuned", "--out", tmp_path, *LOOK, "--json", "--sweep",
        "--task", folder / "labelled.tsv", "--general", folder / "general.txt",
    )  # fmt: skip
    assert status == 0
    settings = json.loads(out)["settings"]
    base, tuned = settings[0], settings[5]
    assert (base["alpha"], tuned["alpha"]) == (0, 1)
    assert base["general"] == 1
    assert tuned["forgetting"] == pytest.approx(1 - tuned["general"])
    model = BertForSequenceClassification.from_pretrained(own / "tuned").eval()
    lines = [line.split("\t") for line in (folder / "labelled.tsv").read_text().splitlines()[1::2]]
    right, losses = 0, []
    for label, text in lines:
        ids = torch.tensor([[2 + WORDS.index(word) for word in text.split()][:LENGTH]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits.double().log_softmax(-1)[0]
        right += int(logs.argmax()) == int(label)
        losses.append(-float(logs[int(label)]))
    assert tuned["accuracy"] == pytest.approx(right / len(lines))
    assert tuned["task"] == pytest.approx(np.mean(losses), rel=1e-5)


def setting(task, forgetting, alpha=None):
    method = "filtered" if alpha is None else INTERPOLATION
    one = None if alpha is not None else 1.0
    return Setting(method, alpha, one, one, task, None, 0.0, forgetting)


def test_the_recommended_setting_forgets_no_more_than_interpolation():
    line = [setting(5.0, 0.0, 0.0), setting(4.0, 0.1, 0.5), setting(3.0, 0.4, 1.0)]
    tried = [setting(3.5, 0.2), setting(3.2, 0.36), setting(2.9, 0.5), setting(4.5, 0.01)]
    found = with_gains([*line, *tried])
    gains = [each.gain for each in found[3:]]
    # On the line at 3.5: 0.25; at 3.2: 0.34; below all, against 0.4; at 4.5: 0.05.
    assert gains == pytest.approx([0.05, -0.02, -0.1, 0.04])
    assert recommended(found) == found[3]
    assert recommended(found[:3]) is None


def test_the_input_of_a_watched_head_is_seen_at_every_token(folder, tmp_path, monkeypatch):
    counts = []
    add = Moments.add

    def counted(self, vectors, weight, matrix=0):
        counts.append(len(vectors))
        add(self, vectors, weight, matrix)

    monkeypatch.setattr(Moments, "add", counted)
    own = folder / "llama"
    merge(own, own / "tuned", "--out", tmp_path / "out", "--samples", "4", "--length", "8")
    assert set(counts) == {4 * 8}


def test_expected_graphs_have_mean_eigenvalue_one(folder):
    keep = token_pieces(folder / "keep.txt", LENGTH)
    expected = Expected(BertForMaskedLM.from_pretrained(folder / "bert" / "base"), keep)
    assert all(np.trace(each) == pytest.approx(len(each)) for each in expected.keep.values())
