"""launch/multinode.sh and what starts it: two nodes are two network namespaces of this machine."""

import contextlib
import importlib.metadata
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ranks as rank_pools
import torch
import yaml
from expected import METHODS
from launching import SCRIPTS, free_port

from spectral_ds import run
from spectral_ds.cli import check, main

pytestmark = pytest.mark.usefixtures("processes")
ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
BINARIES = Path(sys.executable).parent
INTERFACES = ("first0", "second0")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
TIMEOUT_SECONDS = 150
# From the end of one node, or of the launcher, to that of all.
SECONDS_TO_END = 15
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if "SOCKET_IFNAME" not in name},
    "PATH": f"{BINARIES}:{os.environ['PATH']}:/usr/sbin:/sbin",
    "PYTHONPATH": str(ROOT / "tests"),
}


@dataclass(frozen=True)
class Network:
    """Two nodes, each with an interface and an address of its own, joined by a cable."""

    nodes: tuple[str, str]

    def inside(self, node, *words):
        return ["ip", "netns", "exec", self.nodes[node], *map(str, words)]

    def sent(self, node):
        """Bytes that its interface sent."""
        path = f"/sys/class/net/{INTERFACES[node]}/statistics/tx_bytes"
        return int(_said(*self.inside(node, "cat", path)))

    def processes(self):
        return [pid for node in self.nodes for pid in _said("ip", "netns", "pids", node).split()]

    def is_idle_within(self, seconds):
        deadline = time.monotonic() + seconds
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True


def _said(*words):
    return subprocess.run(
        words, check=True, capture_output=True, text=True, env=ENVIRONMENT, timeout=30
    ).stdout


@pytest.fixture(scope="module")
def network():
    if shutil.which("ip", path=ENVIRONMENT["PATH"]) is None:
        pytest.skip("two nodes need the program ip (Debian, Ubuntu: apt-get install iproute2)")
    nodes = tuple(f"sds{os.getpid()}n{node}" for node in range(2))
    made = []
    try:
        for node in nodes:
            _said("ip", "netns", "add", node)
            made.append(node)
        first, second = (("name", i, "netns", n) for i, n in zip(INTERFACES, nodes, strict=True))
        _said("ip", "link", "add", *first, "type", "veth", "peer", *second)
        for node, interface, address in zip(nodes, INTERFACES, ADDRESSES, strict=True):
            _said("ip", "-n", node, "link", "set", "lo", "up")
            _said("ip", "-n", node, "address", "add", f"{address}/24", "dev", interface)
            _said("ip", "-n", node, "link", "set", interface, "up")
        yield Network(nodes)
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split())
        pytest.skip(f"network namespaces are not allowed here: {reason}")
    finally:
        for node in made:
            for pid in _said("ip", "netns", "pids", node).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _said("ip", "netns", "delete", node)


@pytest.fixture
def nothing_is_left(network):
    yield
    assert network.is_idle_within(1), network.processes()


@dataclass(frozen=True)
class Ended:
    code: int
    stdout: str
    stderr: str


def started(*words, cwd=ROOT, **environment):
    return subprocess.Popen(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        # A shell cannot trap what was ignored when it began, as Ctrl-C is in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def ended(*processes, timeout=TIMEOUT_SECONDS):
    """How each ended; none of them survives this."""
    deadline = time.monotonic() + timeout
    try:
        outputs = [each.communicate(timeout=deadline - time.monotonic()) for each in processes]
    except subprocess.TimeoutExpired:
        for each in processes:
            each.terminate()
        pytest.fail("\n".join(str(each.communicate(timeout=60)) for each in processes))
    return [Ended(p.returncode, *out) for p, out in zip(processes, outputs, strict=True)]


def multinode(*words, **options):
    """It alone, on this machine."""
    [end] = ended(started("bash", LAUNCH / "multinode.sh", *words, **options))
    return end


def on_both(network, words, options=({}, {})):
    """It on both nodes without ssh; `options` are of each."""
    return ended(*[
        started(
            *network.inside(node, "bash", LAUNCH / "multinode.sh"),
            *("--nodes", 2, "--slots", 2, "--no_ssh", "--node_rank", node),
            *("--master_addr", ADDRESSES[0], *words),
            **options[node],
        )
        for node in range(2)
    ])  # fmt: skip


@pytest.fixture
def stand_ins(tmp_path):
    """A folder of programs for PATH; those that are here write down how they were started."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def write(name, text):
        path = folder / name
        path.write_text(f"#!/bin/bash\n{text}")
        path.chmod(0o755)

    # What a node then does can be given in a file do.RANK.
    recorded = (
        f"here={tmp_path}\n"
        "for word; do [[ ${last-} == --node[_-]rank ]] && rank=$word && break; last=$word; done\n"
        'printf "%s\\0" "$@" >"$here/${0##*/}.$rank"; env -0 >"$here/environment.$rank"\n'
    )
    write("deepspeed", f'{recorded}pwd; [[ ! -f $here/do.$rank ]] || source "$here/do.$rank"\n')
    write("spectral-ds", recorded)
    write.folder, write.path = folder, f"{folder}:{ENVIRONMENT['PATH']}"
    return write


def recorded(tmp_path, name):
    return Path(tmp_path, name).read_text().split("\0")[:-1]


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


# Training.


def one_node(script, *words):
    """The same training on four ranks of one node."""
    run.main([str(script), *words])


@pytest.mark.usefixtures("nothing_is_left")
def test_two_nodes_train_as_one_does(network, by_ssh, stand_ins, ranks, tmp_path):
    config = {"spectral_ds": METHODS["similarity-heat"], "zero_optimization": {"stage": 3}}
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
    assert end.stderr.count("spectral_ds: attached to the DeepSpeed engine of TinyLlama") == 1
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


# By ssh.


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
    while not (tmp_path / "trains").exists():
        assert node.poll() is None
        time.sleep(0.1)
    node.terminate()
    [end] = ended(node, timeout=SECONDS_TO_END)
    assert end.code == 128 + signal.SIGTERM


# The check.


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


def checked(*words_of_each):
    """`spectral-ds check` by processes that have imported torch already: how each ended."""
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
        return [Ended(*pipe.recv()) if pipe.poll(60) else None for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _check(pipe, words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    pipe.send((code, out.getvalue(), err.getvalue()))


def as_node(rank, nodes=2):
    return ["--nodes", nodes, "--node-rank", rank]


@pytest.mark.parametrize(
    ("present", "problem"),
    [
        ([0, 2], "node 1 did not come within 2 s"),
        ([1, 2], "node 0 did not come within 2 s (no answer from --master-addr 127.0.0.1 "),
    ],
)
def test_a_node_that_never_comes_is_named_on_all_others(present, problem):
    ends = checked(*(as_node(rank, nodes=3) for rank in present))
    for end in ends:
        assert end.code == 1
        [_, line] = end.stderr.splitlines()
        assert line.strip().startswith(problem)


def test_two_nodes_of_one_rank_do_not_pass():
    ends = checked(as_node(0, nodes=3), as_node(1, nodes=3), as_node(1, nodes=3))
    words = "".join(end.stderr for end in ends)
    assert all(end.code != 0 for end in ends)
    assert "--node-rank 1: another node has come as this one" in words
    assert "node 2 did not come" in words


def test_nodes_that_agree_say_what_on(tmp_path):
    (tmp_path / "ds.json").write_text('{"spectral_ds": {}, // as DeepSpeed reads it\n "a": [1]}')
    (tmp_path / "same.json").write_text('{"a": [1], "spectral_ds": {"preset": "paper"}}')
    first, second = checked(
        [*as_node(0), "--config", tmp_path / "ds.json"],
        [*as_node(1), "--config", tmp_path / "same.json", "--json"],
    )
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    for name in check.PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        assert f"{name} {version}" in first.stdout
    assert "no configuration" not in first.stdout
    assert json.loads(second.stdout) == {"hosts": [os.uname().nodename] * 2, "problems": []}


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


# What starts it.


def test_slurm_starts_it_on_each_node_of_the_job(stand_ins, tmp_path):
    stand_ins(
        "scontrol",
        f'case "$1 $2" in "show job") echo "   Command={LAUNCH}/slurm.sbatch train.py" ;;\n'
        '"show hostnames") [[ $3 == "node[1-2]" ]] && printf "localhost\\nnode2\\n" ;; esac\n',
    )
    stand_ins(
        "srun",
        f'printf "%s\\0" "$@" >{tmp_path}/srun.0\nwhile [[ $1 == --* ]]; do shift; done\n'
        'for node in 0 1; do SLURM_NODEID=$node "$@" & done; wait -n && wait -n\n',
    )
    copied = shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")
    job = {"SLURM_JOB_ID": "5007", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_GPUS_ON_NODE": "4"}
    (tmp_path / "train.py").write_text("")
    there = {"PATH": stand_ins.path, "cwd": tmp_path}
    [end] = ended(started("bash", copied, "train.py", "a b", **there, **job))
    assert end.code == 0, end.stderr
    options = recorded(tmp_path, "srun.0")
    assert {"--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(options)
    for node in range(2):
        assert recorded(tmp_path, f"deepspeed.{node}")[2:] == [
            *("--no_ssh", "--node_rank", str(node), "--master_addr", "localhost"),
            *("--master_port", "20014", "--module", "spectral_ds.run", "train.py", "a b"),
        ]
        assert "slots=4 4" in recorded(tmp_path, f"spectral-ds.{node}")

    del job["SLURM_GPUS_ON_NODE"]
    [end] = ended(started("bash", copied, "train.py", **there, **job))
    assert end.code == 2
    assert "RANKS_PER_NODE" in end.stderr


def test_pods_of_the_manifest_start_it(stand_ins, tmp_path):
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas.keys() == {"Master", "Worker"}
    assert replicas["Master"]["replicas"] == 1
    assert "nprocPerNode" not in job["spec"]
    pods = [replica["template"]["spec"]["containers"] for replica in replicas.values()]
    assert pods[0] == pods[1]
    [container] = pods[0]
    assert container["name"] == "pytorch"
    (stand_ins.folder / "spectral-ds").unlink()
    own = {variable["name"]: variable["value"] for variable in container["env"]}
    port = int(free_port())
    # As the operator sets them.
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [*container["command"], *container["args"]]
    pods = [started(*command, **own, **place, RANK=str(n), PATH=stand_ins.path) for n in range(2)]
    for node, end in enumerate(ended(*pods)):
        assert end.code == 0, end.stderr
        option, *rest = recorded(tmp_path, f"deepspeed.{node}")
        assert option == "--hostfile"
        assert rest[1:9] == [
            *("--no_ssh", "--node_rank", str(node), "--master_addr", "localhost"),
            *("--master_port", str(port), "--module"),
        ]
        assert rest[9:11] == ["spectral_ds.run", "launch/finetune.py"]


@pytest.mark.parametrize(
    ("text", "slots"), [("a slots=2\nb slots=3", {"a": 2, "b": 3}), (None, {"node-0": 4})]
)
def test_deepspeed_gets_a_hostfile_that_it_reads(stand_ins, tmp_path, text, slots):
    from deepspeed.launcher.runner import fetch_hostfile

    (tmp_path / "do.0").write_text(f'cp "$2" {tmp_path}/seen')
    given = ["--nodes", 1, "--slots", 4]
    if text is not None:
        (tmp_path / "hosts").write_text(f"# comment\n\n{text} # last")
        given = ["--hostfile", tmp_path / "hosts"]
    words = ["--no_ssh", "--node_rank", 0, "--master_addr", "localhost", LAUNCH / "finetune.py"]
    end = multinode(*given, *words, PATH=stand_ins.path)
    assert end.code == 0, end.stderr
    assert dict(fetch_hostfile(tmp_path / "seen")) == slots


NO_SSH = ["--no_ssh", "--node_rank", "0", "--master_addr", "localhost"]
TWO = ["--nodes", "2", "--slots", "2"]


@pytest.mark.parametrize(
    ("words", "hosts", "message"),
    [
        ([], None, "no script was given"),
        (["train.py"], None, "needs --hostfile HOSTS, or --nodes N and --slots S"),
        (["--hostfile", "none", "train.py"], None, "--hostfile none: no such file"),
        (["--hostfile", "hosts", "t.py"], "a 2", 'hosts: line 1 is "a 2", must be "host slots='),
        (["--hostfile", "hosts", "t.py"], "a slots=0", 'line 1 is "a slots=0"'),
        (["--hostfile", "hosts", "t.py"], "-a slots=1", 'line 1 is "-a slots=1"'),
        (["--hostfile", "hosts", "t.py"], "a slots=1\na slots=1", "line 2: the host a is there"),
        (["--hostfile", "hosts", "t.py"], "# nothing", "--hostfile hosts: has no host"),
        (["--hostfile", "hosts", *TWO, "t.py"], "a slots=1", "give one of them"),
        (["--hostfile", "hosts", "--no_ssh", "t.py"], "a slots=1", "--no_ssh needs --node_rank R"),
        (["--hostfile", "hosts", "--node_rank", "0", "t.py"], "a slots=1", "goes with --no_ssh"),
        ([*TWO, "t.py"], None, "--nodes 2: has no names for ssh"),
        ([*TWO, "--no_ssh", "--node_rank", "0", "t.py"], None, "needs --master_addr"),
        ([*TWO, *NO_SSH, "--node_rank", "2", "t.py"], None, "--node_rank 2: must be a whole number "
         "from 0 to 1"),
        ([*TWO, *NO_SSH, "--master_port", "65535", "t.py"], None, "--master_port 65535: must be a "
         "whole number from 1 to 65534"),
        ([*TWO, "--slots", "two", *NO_SSH, "t.py"], None, "--slots two: must be a whole number"),
        ([*TWO, *NO_SSH, "--master_port"], None, "--master_port needs a value"),
        ([*TWO, *NO_SSH, "--slot", "3", "t.py"], None, "unknown argument --slot before TRAIN.py"),
        ([*TWO, *NO_SSH, "none.py"], None, "none.py: no such file on "),
    ],
)  # fmt: skip
def test_it_refuses_what_cannot_be(tmp_path, words, hosts, message):
    if hosts is not None:
        (tmp_path / "hosts").write_text(hosts + "\n")
    end = multinode(*words, cwd=tmp_path)
    assert end.code == 2
    [line] = end.stderr.splitlines()
    assert line.startswith("multinode: ")
    assert message in line


# The network interface.


def interfaces(network, node, master, **environment):
    shown = 'source launch/network.sh "$0" && echo "$NCCL_SOCKET_IFNAME $GLOO_SOCKET_IFNAME"'
    [end] = ended(started(*network.inside(node, "bash", "-c", shown, master), **environment))
    return end


@pytest.mark.parametrize("node", [0, 1])
def test_the_interface_is_that_towards_node_0(network, node):
    end = interfaces(network, node, ADDRESSES[0])
    assert end.stdout.split() == [f"={INTERFACES[node]}", INTERFACES[node]]
    assert f"network: {INTERFACES[node]} ({ADDRESSES[node]})" in end.stderr


def test_a_value_that_is_set_wins(network):
    one = interfaces(network, 1, ADDRESSES[0], NCCL_SOCKET_IFNAME="ib0")
    assert one.stdout.split() == ["ib0", INTERFACES[1]]
    both = {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "eth7"}
    end = interfaces(network, 1, "no.such.name.invalid", **both)
    assert (end.stdout.split(), end.stderr) == (["ib0", "eth7"], "")


def test_a_loopback_name_of_node_0_means_the_default_route(network):
    assert interfaces(network, 0, "127.0.1.1").stdout.split() == ["=lo", "lo"]
    _said("ip", "-n", network.nodes[0], "route", "add", "default", "via", ADDRESSES[1])
    try:
        end = interfaces(network, 0, "127.0.1.1")
        assert end.stdout.split() == [f"={INTERFACES[0]}", INTERFACES[0]]
    finally:
        _said("ip", "-n", network.nodes[0], "route", "delete", "default")


@pytest.mark.parametrize("master", ["10.9.9.9", "no.such.name.invalid"])
def test_no_way_to_node_0_is_an_error(network, master):
    end = interfaces(network, 1, master)
    assert (end.code, end.stdout) == (1, "")
    [line] = end.stderr.splitlines()
    assert line.startswith(f"network: no way to node 0, {master} (")
