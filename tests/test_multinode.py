"""launch/multinode.sh on two nodes: they train as one does, and none outlives another."""

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from expected import METHODS
from launching import SCRIPTS
from nodes import ADDRESSES, INTERFACES, LAUNCH, ROOT, ended, on_both, recorded, started

from spectral_ds import run

pytestmark = pytest.mark.usefixtures("processes")


# From the end of one node, or of the launcher, to that of all.
SECONDS_TO_END = 15


@pytest.fixture
def by_ssh(network, stand_ins, tmp_path):
    """Starts multinode.sh with an ssh that logs in to a namespace, in an environment of its own."""
    stand_ins(
        "ssh",
        'while [[ $1 == -* ]]; do shift 2; done\nhost=$1\nshift\nexec ip netns exec "$host" env -i '
        'HOME="$HOME" PATH=/usr/sbin:/usr/bin:/sbin:/bin sh -c "cd /; $*"\n',
    )
    (tmp_path / "hosts").write_text("# two\n" + "".join(f"{n} slots=2\n" for n in network.nodes))

    def start(*words, **options):
        options = {"PATH": stand_ins.path, **options}
        given = ("--hostfile", tmp_path / "hosts", "--master_addr", ADDRESSES[0])
        return started("bash", LAUNCH / "multinode.sh", *given, *words, **options)

    return start


def one_node(script, *words):
    """The same training on four ranks of one node."""
    sys.path.insert(0, "")  # the script's folder takes the first place, which is that of the tests
    run.main([str(script), *words])


@pytest.mark.usefixtures("nothing_is_left")
def test_two_nodes_train_as_one_does(network, by_ssh, stand_ins, ranks, tmp_path):
    config = {
        "spectral_ds": METHODS["similarity-heat"],
        "train_micro_batch_size_per_gpu": 6,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    script = SCRIPTS / "multinode_loop.py"
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    given = ["--deepspeed_config", str(tmp_path / "ds.json"), "--output"]
    before = [network.sent(node) for node in range(2)]
    for name in ("deepspeed", "spectral-ds"):
        (stand_ins.folder / name).unlink()
    [end] = ended(by_ssh(script, *given, two))
    assert end.code == 0, end.stderr
    assert f"{network.nodes[0]}: spectral-ds check: 2 nodes agree: python 3." in end.stdout
    sent = [network.sent(node) - start for node, start in enumerate(before)]
    assert end.stderr.count("spectral_ds: attached to the DeepSpeed engine of Blocks") == 1
    ranks(4).run(one_node, script, *given, str(one))

    wanted, found = torch.load(one), torch.load(two)
    interfaces = [rank["interface"] for rank in found["ranks"]]
    assert interfaces == [INTERFACES[0], INTERFACES[0], INTERFACES[1], INTERFACES[1]]
    # At least one shard of the weights leaves a node at each of three steps.
    least = 3 * sum(4 * weight.numel() for weight in found["weights"].values()) / 4
    assert all(least < number < 500 * least for number in sent), (least, sent)
    for here, there in zip(wanted["ranks"], found["ranks"], strict=True):
        assert there["losses"] == pytest.approx(here["losses"], abs=1e-6)
    assert wanted["weights"].keys() == found["weights"].keys()
    for name, weight in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("nothing_is_left")
def test_by_ssh_nodes_have_the_folder_the_environment_and_the_words(by_ssh, network, tmp_path):
    folder = tmp_path / "a folder; $HOME"
    folder.mkdir()
    (folder / "train it.py").write_text("")
    (tmp_path / "do.1").write_text("printf 'one\\rtwo\\n' >&2")
    words = ["--text", "a 'b' \"c\" $d\n*", "--deepspeed_config=ds.json", ""]
    variables = {"HF_HOME": "/x y;'z'\n", "SPECTRAL_DS_CONFIG": "s.yaml", "MY_OWN": "secret"}
    [end] = ended(by_ssh("--master_port", 4000, "train it.py", *words, cwd=folder, **variables))
    assert end.code == 0, end.stderr
    assert sorted(end.stdout.splitlines()) == [f"{node}: {folder}" for node in network.nodes]
    assert f"{network.nodes[1]}: one\n{network.nodes[1]}: two\n" in end.stderr
    for node in range(2):
        option, hostfile, *rest = recorded(tmp_path, f"deepspeed.{node}")
        assert option == "--hostfile"
        assert not Path(hostfile).exists()
        assert rest == [
            *("--no_ssh", "--node_rank", str(node), "--master_addr", ADDRESSES[0]),
            *("--master_port", "4000", "--module", "spectral_ds.run", "train it.py", *words),
        ]
        checked = recorded(tmp_path, f"spectral-ds.{node}")
        assert checked == [
            *("check", "--nodes", "2", "--node-rank", str(node), "--master-addr", ADDRESSES[0]),
            *("--master-port", "4001", "--timeout", "600", "--same", "slots=2 2"),
            *("--config", "ds.json"),
        ]
        environment = dict(x.split("=", 1) for x in recorded(tmp_path, f"environment.{node}"))
        assert environment["HF_HOME"] == variables["HF_HOME"]
        assert environment["SPECTRAL_DS_CONFIG"] == "s.yaml"
        assert environment["GLOO_SOCKET_IFNAME"] == INTERFACES[node]
        assert environment["NCCL_SOCKET_IFNAME"] == f"={INTERFACES[node]}"
        assert "MY_OWN" not in environment


TRAINS_ON = "sleep 600 & sleep 600"


@pytest.mark.parametrize("failing", [0, 1])
def test_by_ssh_a_node_that_fails_ends_the_others(by_ssh, network, tmp_path, failing):
    other = tmp_path / "other"
    (tmp_path / f"do.{failing}").write_text(f"while [[ ! -f {other} ]]; do sleep 0.1; done; exit 3")
    (tmp_path / f"do.{1 - failing}").write_text(f"touch {other}; {TRAINS_ON}")
    [end] = ended(by_ssh(LAUNCH / "finetune.py"), timeout=10 + SECONDS_TO_END)
    assert end.code == 3
    assert f"{network.nodes[failing]} (node {failing}) ended with status 3" in end.stderr
    assert network.is_idle_within(1), network.processes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_by_ssh_no_node_outlives_the_launcher(by_ssh, network, tmp_path, number):
    for node in range(2):
        (tmp_path / f"do.{node}").write_text(f"touch {tmp_path}/trains.{node}; {TRAINS_ON}")
    launcher = by_ssh(LAUNCH / "finetune.py")
    deadline = time.monotonic() + 30
    while not all((tmp_path / f"trains.{node}").exists() for node in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(network.processes()) >= 6
    launcher.send_signal(number)
    [end] = ended(launcher, timeout=SECONDS_TO_END)
    assert end.code == (-number if number == signal.SIGKILL else 128 + number)
    assert network.is_idle_within(SECONDS_TO_END), network.processes()


@pytest.mark.usefixtures("nothing_is_left")
def test_a_node_that_ignores_to_be_ended_is_killed(network, stand_ins, tmp_path):
    launch = shutil.copytree(LAUNCH, tmp_path / "launch")
    impatient = (launch / "multinode.sh").read_text().replace("TO_END=10", "TO_END=1")
    (launch / "multinode.sh").write_text(impatient)
    stubborn = f"trap '' TERM; touch {tmp_path}/trains; while :; do sleep 0.5; done"
    (tmp_path / "do.0").write_text(stubborn)
    words = ["--nodes", 1, "--slots", 1, "--no_ssh", "--node_rank", 0]
    words += ["--master_addr", ADDRESSES[0], launch / "finetune.py"]
    node = started(*network.inside(0, "bash", launch / "multinode.sh", *words), PATH=stand_ins.path)
    deadline = time.monotonic() + 30
    while not (tmp_path / "trains").exists():
        assert node.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    node.terminate()
    [end] = ended(node, timeout=SECONDS_TO_END)
    assert end.code == 128 + signal.SIGTERM


@pytest.mark.usefixtures("nothing_is_left")
def test_nodes_that_differ_all_say_so_and_do_not_train(network, tmp_path, stand_ins):
    (stand_ins.folder / "spectral-ds").unlink()
    shutil.copytree(ROOT / "spectral_ds", tmp_path / "old" / "spectral_ds")
    with (tmp_path / "old" / "spectral_ds" / "plugin.py").open("a") as file:
        file.write("\n")
    options = []
    for node, tau in enumerate((1.0, 2.0)):
        folder = tmp_path / f"node{node}"
        folder.mkdir()
        (folder / "train.py").write_text("")
        section = {"filter": {"tau": tau}}
        (folder / "ds.json").write_text(json.dumps({"spectral_ds": section}))
        options.append({"cwd": folder, "PATH": stand_ins.path})
    options[1]["PYTHONPATH"] = str(tmp_path / "old")
    both = on_both(network, ["train.py", "--deepspeed", "ds.json"], options)
    for end in both:
        assert end.code == 1
        [_, source, config] = _complaints(end.stderr)
        assert "node 1 (" in source
        assert "spectral_ds/plugin.py is SHA-256 " in source
        assert ", on node 0 (" in source
        assert "spectral_ds.filter.tau is 2.0, on node 0 (" in config
        assert config.endswith(") 1.0")
    assert not list(tmp_path.glob("deepspeed.*"))


def _complaints(stderr):
    return stderr[stderr.index("spectral-ds check: these nodes cannot") :].splitlines()
