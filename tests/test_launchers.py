"""What starts launch/multinode.sh, what it refuses, and the network interface that it takes."""

import shutil

import pytest
import yaml
from launching import free_port
from nodes import ADDRESSES, INTERFACES, LAUNCH, ended, recorded, said, started

pytestmark = pytest.mark.usefixtures("processes")


def multinode(*words, **options):
    """It alone, on this machine."""
    [end] = ended(started("bash", LAUNCH / "multinode.sh", *words, **options))
    return end


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
        checked = recorded(tmp_path, f"spectral-ds.{node}")
        assert checked[:7] == [
            *("check", "--nodes", "2", "--node-rank", str(node), "--master-addr", "localhost"),
        ]


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
    said("ip", "-n", network.nodes[0], "route", "add", "default", "via", ADDRESSES[1])
    try:
        end = interfaces(network, 0, "127.0.1.1")
        assert end.stdout.split() == [f"={INTERFACES[0]}", INTERFACES[0]]
    finally:
        said("ip", "-n", network.nodes[0], "route", "delete", "default")


@pytest.mark.parametrize("master", ["10.9.9.9", "no.such.name.invalid"])
def test_no_way_to_node_0_is_an_error(network, master):
    end = interfaces(network, 1, master)
    assert (end.code, end.stdout) == (1, "")
    [line] = end.stderr.splitlines()
    assert line.startswith(f"network: no way to node 0, {master} (")
