"""`spectral-ds plan` on the command line."""

import json

import pytest
import tiny
import torch
from transformers import BertConfig, CLIPConfig, T5Config

from spectral_ds.cli import main
from spectral_ds.cli.plan.models import KNOWN_MODELS, model_of
from spectral_ds.config import load_config
from spectral_ds.geometry.buckets import bucket_elements
from spectral_ds.planning import Cluster, Machine, plan_configuration


def plan_by_command(capsys, *words):
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_largest_model_on_a_thousand_ranks(capsys):
    words = ["--model", "llama-3-70b", "--world-size", "1024", "--tokens", "8192"]
    found = plan_by_command(capsys, *words, "--engine", "zero3")
    assert found["parameters"] == 70_553_706_496
    assert found["nodes"] == 128
    shard = found["per_rank"]["elements"]["mean"] * 4
    # All weight matrices are transposed and sent back.
    assert found["per_rank"]["bytes_per_step"]["total"]["mean"] == pytest.approx(
        2 * shard, rel=0.01
    )
    assert found["step"]["seconds"] == pytest.approx(6 * found["parameters"] * 8192 / 400e12)
    assert "node: column" in found["advice"]
    depth = plan_by_command(capsys, *words, "--engine", "zero1", "--config", "gradient_smoothing")
    assert depth["bytes_per_step"] > 0
    assert depth["other_engines"]["zero3"]["bytes_per_step"] == 0
    assert "Under zero3 the same graph sends nothing" in depth["advice"]


@pytest.fixture(scope="module")
def llama():
    return model_of("llama-3-8b")


@pytest.mark.parametrize("engine", ["zero1", "zero3", "fsdp2"])
@pytest.mark.parametrize("world_size", [64, 256])
@pytest.mark.parametrize("preset", ["gradient_smoothing", "paper", "retain"])
def test_what_is_worked_on_at_once_is_a_shard_at_most(llama, preset, engine, world_size):
    plan = plan_configuration(
        llama,
        load_config({"preset": preset}),
        engine,
        Cluster(world_size, world_size // 8),
        Machine(),
        bucket_elements(torch.device("cuda")),
    )
    shard = 4 * plan.elements.mean()
    most = max(1.01 * shard, 4 * 5 * 2**24)  # slices are of 16 columns at least
    assert plan.device_memory["scratch"].max() <= most


def test_presets_have_their_published_sizes():
    sizes = {"llama-3-8b": 8_030_261_248, "smollm2-135m": 134_515_008}
    for name, elements in sizes.items():
        assert model_of(name).elements == elements
    assert set(KNOWN_MODELS) == {*sizes, "llama-3-70b"}


def test_a_folder_is_planned_like_the_model_in_it(tmp_path, capsys):
    tiny.llama_config(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    words = ["--model", str(tmp_path), "--engine", "fsdp2", "--world-size", "4"]
    found = plan_by_command(capsys, *words, "--nodes", "2", "--device", "cpu")
    assert found["parameters"] == sum(p.numel() for p in tiny.LlamaForCausalLM(
        tiny.llama_config()).parameters())  # fmt: skip
    within, across = (
        found["per_rank"]["bytes_per_step"][where]["mean"]
        for where in ("within_node", "across_nodes")
    )
    assert 0 < within < across


ACTIVATIONS = """graph: {node: column, edges: [{family: activations, rank: 8, keep: random}]}
filter: {response: tikhonov, strength: 1.0, apply_to: update}
"""


def test_graphs_of_activations_are_planned_from_shapes(tmp_path, capsys):
    config = tmp_path / "activations.yaml"
    config.write_text(ACTIVATIONS)
    words = ["--model", "smollm2-135m", "--world-size", "64", "--config", str(config)]
    found = plan_by_command(capsys, *words, "--engine", "zero3")
    [graph] = found["graphs"]
    inputs = 30 * (3 * 576 + 1536)
    assert graph["nodes"] == inputs
    assert graph["graphs"] == {"expected": 30 * 4, "most": 30 * 7}
    # Float64 sums of 16 columns, and what they are projected on.
    assert found["per_rank"]["calibration_bytes"] == 8 * 16 * inputs + 4 * 16 * (576 + 1536)
    device = found["per_rank"]["device_bytes"]
    assert device["directions"]["worst"] == 2 * 4 * 8 * inputs
    # Keys and values have 192 rows of 576, of which 64 ranks have 3 each: no row is cut.
    assert found["bytes_per_step"] == 0
    assert "no shard boundary cuts a row" in found["advice"]
    flat = plan_by_command(capsys, *words, "--engine", "zero2")
    assert 0 < flat["bytes_per_step"] < 64 * 4 * 8 * 4
    assert (
        sum(group["bytes_per_step"] for group in flat["graphs"][0]["groups"])
        == (flat["bytes_per_step"])
    )
    assert main(["plan", *words, "--engine", "zero2"]) == 0
    out = capsys.readouterr().out
    assert "97,920 inputs of layers in 120 graphs of activations by names; 210 if no two" in out
    assert "cut rows" in out
    assert "while looking at activations" in out


def test_wrong_input_is_one_line(tmp_path, capsys):
    words = ["--model", "llama-3-8b", "--engine", "zero3", "--world-size", "12"]
    config = tmp_path / "wrong.yaml"
    config.write_text("graph: {exclude: ['*nothing*']}")
    for more, reason in {
        ("--nodes", "5"): "does not divide among 5 nodes",
        ("--tokens", "0"): "'0' is not a whole number from 1 on",
        ("--flops", "nan"): "'nan' is not a number above 0",
        ("--config", "papr"): "--config papr: no such file, and no preset: paper, retain, ",
        ("--config", str(config)): "pattern '*nothing*' matches no trainable parameter",
    }.items():
        assert main(["plan", *words, *more]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1


def test_models_that_are_no_causal_ones_are_planned_and_what_is_none_is_one_line(tmp_path, capsys):
    small = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 1}
    words = ["--engine", "zero2", "--world-size", "2", "--model"]
    for architectures in (None, ["T5WithLMHeadModel"]):
        config = T5Config(vocab_size=53, architectures=architectures, **small)
        config.save_pretrained(tmp_path / "t5")
        assert plan_by_command(capsys, *words, str(tmp_path / "t5"))["parameters"] > 0
    BertConfig(hidden_size=17, num_attention_heads=4).save_pretrained(tmp_path / "bert")
    assert main(["plan", *words, str(tmp_path / "bert")]) == 2
    error = capsys.readouterr().err
    assert "bert: its configuration makes no model" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"pad_token_id": 53}, "its configuration makes no model: Padding_idx"),
        ({"max_position_embeddings": 0},
         "makes no model: bert.embeddings.position_embeddings.weight has no elements"),
        ({"architectures": [None]}, "architectures = [null]: must be"),
        ({"architectures": "BertModel"}, 'architectures = "BertModel": must be'),
        ({"architectures": ["pipeline"]}, 'architectures = ["pipeline"]: must be'),
    ],
)  # fmt: skip
def test_a_configuration_of_no_model_is_one_line(tmp_path, capsys, wrong, said):
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 53}
    written = {"model_type": "bert", "intermediate_size": 24, **small, **wrong}
    (tmp_path / "config.json").write_text(json.dumps(written))
    words = ["--engine", "zero2", "--world-size", "2", "--model", str(tmp_path)]
    assert main(["plan", *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"spectral-ds: {tmp_path}: ")
    assert said in line


def test_parameters_of_no_dimension_are_planned_but_under_fsdp2(tmp_path, capsys):
    part = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "projection_dim": 8}  # fmt: skip
    whole = {"text_config": part, "vision_config": part, "architectures": ["CLIPModel"]}
    CLIPConfig(projection_dim=8, **whole).save_pretrained(tmp_path)
    words = ["--model", str(tmp_path), "--world-size", "2", "--engine"]
    found = plan_by_command(capsys, *words, "zero2")
    assert found["other_engines"].keys() == {"zero3"}
    assert main(["plan", *words, "fsdp2"]) == 2
    assert "--engine fsdp2: fully_shard refuses" in (error := capsys.readouterr().err)
    assert "logit_scale" in error


def test_sums_are_counted_and_samples_are_told(capsys, tmp_path):
    words = ["--model", "smollm2-135m", "--engine", "zero3", "--world-size", "8", "--config"]
    found = plan_by_command(capsys, *words, "denoise")
    assert found["bytes_per_step"] == 0
    assert "Nothing but samples is sent" in found["advice"]
    assert "samples of the gradient, every step" in found["advice"]
    config, counts = tmp_path / "section.yaml", []
    for rescale in ("none", "norm"):
        for temporal in ("null", "{decay: 0.9}"):
            config.write_text(
                "graph: {edges: [{family: depth}]}\n"
                f"filter: {{rescale: {rescale}, temporal: {temporal}}}"
            )
            planned = plan_by_command(capsys, *words, str(config))
            assert "samples" not in planned["advice"]
            counts.append(planned["collectives_per_step"])
    assert counts == [0, 2, 2, 4]


def test_only_the_first_of_several_processes_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["plan", "--model", "smollm2-135m", "--engine", "zero2", "--world-size", "8"]) == 0
    assert capsys.readouterr().out == ""


def test_people_read_a_table(capsys):
    words = ["plan", "--model", "smollm2-135m", "--engine", "zero2", "--world-size", "16"]
    assert main([*words, "--config", "gradient_smoothing", "--tokens", "512"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj.weight" in out
    assert "boundary" in out
    assert out.count("sent a step") >= 2
