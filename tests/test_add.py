"""`spectral-ds add`: one more key, the rest byte for byte; the ready configurations load."""

import json
import resource
from pathlib import Path

import deepspeed
import hjson
import pytest
import tiny
import torch.distributed as dist

import spectral_ds
from spectral_ds.cli import main

CONFIGS = Path(__file__).parent.parent / "configs"
SECTION = '"spectral_ds": {"preset": "retain"}'

TEXTS = {
    "empty": ("{}", "{%s}"),
    "one line": ('{"a": 1}\n', '{"a": 1, %s}\n'),
    "indented": ('{\n    "a": {"b": [1, 2]}\n}\n', '{\n    "a": {"b": [1, 2]},\n    %s\n}\n'),
    "brace on the last line": ('{\n\t"a": 1 }', '{\n\t"a": 1,\n\t%s\n}'),
    "comma at the end": ('{\n  "a": 1,\n}\n', '{\n  "a": 1,\n  %s\n}\n'),
    "comments": (
        '// head {\n{\n  # of "a"\n  "a": "}", // last\n  "b": 2 // { "c": 3,\n  /* end\n  } */\n}\n#',  # noqa: E501
        '// head {\n{\n  # of "a"\n  "a": "}", // last\n  "b": 2, // { "c": 3,\n  /* end\n  } */\n'
        "  %s\n}\n#",
    ),
    "comment without a space": ('{\n  "a": 1//one\n}', '{\n  "a": 1,//one\n  %s\n}'),
    "windows": ('{\r\n  "a": "é"\r\n}\r\n', '{\r\n  "a": "é",\r\n  %s\r\n}\r\n'),
    "escapes": ('{"a": "\\"}, {"}', '{"a": "\\"}, {", %s}'),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_the_section_is_added_as_the_last_key(tmp_path, capsys, kind):
    text, wanted = TEXTS[kind]
    path = tmp_path / "ds.json"
    path.write_bytes(text.encode())
    assert main(["add", str(path), "--preset", "retain"]) == 0
    printed = capsys.readouterr().out
    assert printed == wanted % SECTION
    assert path.read_bytes() == text.encode()
    assert list(hjson.loads(printed))[-1] == "spectral_ds"

    assert main(["add", str(path), "--preset", "retain", "--write"]) == 0
    assert path.read_bytes() == printed.encode()
    assert capsys.readouterr().out == ""
    assert spectral_ds.load_config(path).preset == "retain"


def test_a_section_that_is_there_is_replaced_only_by_force(tmp_path, capsys):
    path = tmp_path / "ds.json"
    text = '{"a": 1, "spectral_ds": {"preset": "observe",\n "seed": 1}, // mine\n "b": [2]}'
    path.write_text(text)
    assert main(["add", str(path), "--preset", "retain", "--write"]) == 2
    assert "already" in capsys.readouterr().err
    assert path.read_text() == text
    assert main(["add", str(path), "--preset", "retain", "--write", "--force"]) == 0
    assert path.read_text() == '{"a": 1, ' + SECTION + ', // mine\n "b": [2]}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["ds.json", "cannot be read"]),
        ('{"a": [1, }', ["ds.json", "cannot be read as JSON"]),
        ('{"a": 1, "a": 2}', ["ds.json", 'the key "a" is written twice']),
        ("[1]", ["ds.json", "object"]),
        ("a: 1\nb: no braces\n", ["ds.json", "by hand", SECTION.replace("retain", "paper")]),
        (b"\xff", ["ds.json", "cannot be read"]),
    ],
)
def test_what_cannot_be_edited_is_one_line(tmp_path, capsys, text, words):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["add", str(path), "--write"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    for word in words:
        assert word in line
    if text is not None:
        assert path.read_bytes() == (text if isinstance(text, bytes) else text.encode())


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text("{}")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as if nothing more went onto it
    try:
        status = main(["add", str(path), "--write"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"spectral-ds: {path}: ")
    assert [each.name for each in tmp_path.iterdir()] == ["ds.json"]
    assert path.read_text() == "{}"


def test_a_preset_that_is_none_is_one_line(tmp_path, capsys):
    assert main(["add", str(tmp_path / "ds.json"), "--preset", "papr"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "papr" in line
    assert "paper" in line


@pytest.mark.parametrize(
    "path",
    sorted(path for path in CONFIGS.iterdir() if path.suffix in (".json", ".yaml")),
    ids=lambda path: path.name,
)
def test_every_ready_configuration_loads(path):
    assert spectral_ds.load_config(path).enabled
    if path.suffix == ".json":
        json.loads(path.read_text())  # without comments, as other tools want it
        parsed = deepspeed.runtime.config.DeepSpeedConfig(str(path))
        assert f"zero{int(parsed.zero_config.stage)}" in path.name
        assert parsed.bfloat16_config.enabled == ("zero2" not in path.name)
        assert ("offload" in path.name) == (parsed.zero_config.offload_param is not None)


def one_step_of(path):
    """A step by the file as it is, but for what this machine would have to compile or write."""
    config = json.loads(Path(path).read_text())
    config["optimizer"]["params"]["torch_adam"] = True
    config |= {
        "zero_force_ds_cpu_optimizer": False,
        "tensorboard": {"enabled": False},
        "train_micro_batch_size_per_gpu": tiny.GLOBAL_BATCH // dist.get_world_size(),
    }
    model = tiny.TinyLlama()
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = spectral_ds.initialize(model=model, model_parameters=trained, config=config)
    plugin = spectral_ds.plugin_of(engine)
    [tokens] = tiny.batches(1)
    loss = engine(tokens)
    engine.backward(loss)
    engine.step()
    metrics = plugin.metrics()
    engine.destroy()
    return loss.item(), metrics["gradient_norm/after"] < metrics["gradient_norm/before"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_every_ready_deepspeed_configuration_trains(ranks, path):
    for loss, is_smoothed in ranks(2).run(one_step_of, str(path)):
        assert 0 < loss < 10
        assert is_smoothed
