"""`spectral-ds check`: nodes agree on all that must be alike, or each says what is not."""

import contextlib
import importlib.metadata
import io
import json
import os
import socket
from dataclasses import replace

import pytest
import ranks as rank_pools
from launching import free_port
from nodes import (
    Ended,
)

from spectral_ds.cli import check, main


def checked(*words_of_each):
    """`spectral-ds check` by processes that begin together: how each ended."""
    place = ["--master-addr", "127.0.0.1", "--master-port", free_port(), "--timeout", "2"]
    pipes, processes = [], []
    for words in words_of_each:
        ours, theirs = rank_pools._context.Pipe()
        arguments = theirs, ["check", *place, *map(str, words)]
        processes.append(rank_pools._context.Process(target=_check, args=arguments, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        for pipe in pipes:
            assert pipe.poll(60)
            assert pipe.recv() == "ready"
        for pipe in pipes:
            pipe.send("go")
        return [Ended(*pipe.recv()) if pipe.poll(60) else None for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _check(pipe, words):
    pipe.send("ready")
    pipe.recv()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    pipe.send((code, out.getvalue(), err.getvalue()))


def as_node(rank, nodes=2):
    return ["--nodes", nodes, "--node-rank", rank]


@pytest.mark.usefixtures("processes")
def test_a_first_node_that_never_comes_is_named_on_all_others():
    for end in checked(as_node(1, nodes=3), as_node(2, nodes=3)):
        assert end.code == 1
        [_, line] = end.stderr.splitlines()
        assert line.strip().startswith(
            "node 0 did not come within 2 s (no answer from --master-addr 127.0.0.1 "
        )


@pytest.mark.usefixtures("processes")
def test_two_nodes_of_one_rank_do_not_pass_and_one_that_never_comes_is_named():
    first, *others = checked(as_node(0, nodes=3), as_node(1, nodes=3), as_node(1, nodes=3))
    accepted, refused = sorted(others, key=lambda end: end.code)
    for end in (first, accepted):
        assert end.code == 1
        [_, line] = end.stderr.splitlines()
        assert line.strip() == "node 2 did not come within 2 s"
    assert refused.code == 2
    assert "--node-rank 1: another node has come as this one" in refused.stderr


@pytest.mark.usefixtures("processes")
def test_nodes_that_agree_say_what_on(tmp_path):
    (tmp_path / "ds.json").write_text('{"spectral_ds": {}, // as DeepSpeed reads it\n "a": [1]}')
    (tmp_path / "same.json").write_text('{"a": [1], "spectral_ds": {"preset": "paper"}}')
    first, second = checked(
        [*as_node(0), "--config", tmp_path / "ds.json"],
        [*as_node(1), "--config", tmp_path / "same.json", "--json"],
    )
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    for name in ("spectral-ds", "torch", "deepspeed", "transformers", "torch-sparse"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        assert f"{name} {version}" in first.stdout
    assert "no configuration" not in first.stdout
    assert json.loads(second.stdout) == {"hosts": [os.uname().nodename] * 2, "problems": []}


@pytest.mark.usefixtures("processes")
def test_what_only_one_node_cannot_read_is_said_on_both(tmp_path):
    (tmp_path / "ds.json").write_text('{"spectral_ds": {"seed": 1}}')
    (tmp_path / "misspelt.json").write_text('{"spectral_ds": {"sead": 1}}')
    for end in checked(
        [*as_node(0), "--config", tmp_path / "ds.json"],
        [*as_node(1), "--config", tmp_path / "misspelt.json"],
    ):
        assert end.code == 1
        [_, line] = end.stderr.splitlines()
        for word in "node 1 (", "spectral_ds.sead", "spectral_ds.seed":
            assert word in line


def here(**values):
    node = check.look_here(3)
    return replace(node, values={**node.values, **values})


def test_a_difference_names_the_node_the_thing_and_both_values():
    nodes = [here(torch="1.0"), here(torch="2.0"), here(torch="1.0", own="x"), None]
    host = os.uname().nodename
    assert check.compare(nodes, timeout=1).problems == [
        f"node 1 ({host}): torch is 2.0, on node 0 ({host}) 1.0",
        f"node 2 ({host}): own is x, on node 0 ({host}) absent",
        "node 3 did not come within 1 s",
    ]
    many = here(**{str(number): "" for number in range(check.MOST_LISTED + 5)})
    problems = check.compare([here(), many], timeout=1).problems
    assert problems[-1] == f"node 1 ({host}): 5 more differences"
    assert len(problems) == check.MOST_LISTED + 1


def test_inputs_of_a_graph_of_activations_are_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = {"node": "column", "edges": [{"family": "activations", "keep": "texts.txt"}]}
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"spectral_ds": {"graph": section}}))
    missing = check.look_here(2, config)
    [line] = missing.trouble
    assert line == 'spectral_ds.graph.edges[0].keep = "texts.txt": no such file or folder'
    seen = []
    for text in ("one", "one", "another"):
        (tmp_path / "texts.txt").write_text(text)
        seen.append(check.look_here(2, config))
    assert check.compare(seen[:2], 1.0).problems == []
    [problem] = check.compare(seen[1:], 1.0).problems
    assert "content of texts.txt is SHA-256" in problem
    assert check.compare([seen[0], missing], 1.0).problems == [f"node 1 ({missing.host}): {line}"]
    (tmp_path / "texts.txt").unlink()
    (tmp_path / "texts.txt").mkdir()
    (tmp_path / "texts.txt" / "part").write_text("one")
    assert len(check.compare([seen[0], check.look_here(2, config)], 1.0).problems) == 1


def test_inputs_that_cannot_be_read_are_told_as_other_trouble_is(tmp_path):
    section = {"node": "column", "edges": [{"family": "activations", "keep": "/proc/self/mem"}]}
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"spectral_ds": {"graph": section}}))
    [line] = check.look_here(2, config).trouble
    assert line.startswith('spectral_ds.graph.edges[0].keep = "/proc/self/mem": cannot be read: ')


def test_inputs_of_a_section_that_is_off_need_not_be_there(tmp_path):
    section = {"node": "column", "edges": [{"family": "activations", "keep": "gone.txt"}]}
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"spectral_ds": {"enabled": False, "graph": section}}))
    assert check.look_here(2, config).trouble == []


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", "--master-addr : "),
        ("a" * 70, f"--master-addr {'a' * 70}: encoding with 'idna' codec failed"),
    ],
)
def test_an_address_that_no_host_has_is_named_on_the_first_node(capfd, address, message):
    place = ["--master-addr", address, "--master-port", free_port(), "--timeout", "0.1"]
    assert main(["check", *map(str, [*as_node(0), *place])]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert message in line


def test_the_file_of_the_environment_goes_over_the_section(tmp_path, monkeypatch):
    (tmp_path / "ds.json").write_text('{"spectral_ds": {"seed": 1}, "a": {"b": [true]}}')
    (tmp_path / "section.yaml").write_text("seed: 2")
    monkeypatch.delenv("SPECTRAL_DS_CONFIG", raising=False)
    values = check.look_here(1, tmp_path / "ds.json").values
    assert (values["spectral_ds.seed"], values["a.b[0]"]) == ("1", "true")
    assert check.look_here(1, tmp_path / "section.yaml").values["spectral_ds.seed"] == "2"
    monkeypatch.setenv("SPECTRAL_DS_CONFIG", str(tmp_path / "section.yaml"))
    assert check.look_here(1, tmp_path / "ds.json").values == {**values, "spectral_ds.seed": "2"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", 0, "--node-rank", 0], "--nodes 0: must be at least 1"),
        (["--nodes", 2, "--node-rank", 2], "--node-rank 2: must be from 0 to 1"),
        ([*as_node(0), "--timeout", 0], "--timeout 0: must be above 0"),
        ([*as_node(0), "--timeout", "inf"], "--timeout inf: must be above 0 and finite"),
        ([*as_node(0), "--same", "python=3"], "--same python=3: must be NAME=VALUE, and not"),
        ([*as_node(0), "--same", "slots"], "--same slots: must be NAME=VALUE"),
        ([*as_node(0), "--master-port", 70000], "--master-port 70000: must be from 1 to 65535"),
    ],
)
def test_the_check_refuses_what_cannot_be(capsys, words, message):
    assert main(["check", "--master-addr", "a", "--master-port", "1", *map(str, words)]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(capsys):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = ["--master-addr", "127.0.0.1", "--master-port", str(port), "--timeout", "2"]
        assert main(["check", *map(str, as_node(0)), *place]) == 2
    message = capsys.readouterr().err
    assert f"--master-port {port}" in message
    assert "EADDRINUSE" in message
