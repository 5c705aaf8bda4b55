"""Two nodes, which are two network namespaces of this machine, and the programs that they start.

Fixtures: `network`, `nothing_is_left`, and `stand_ins` for programs that a node would start.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import NOT_COMPILED

ROOT = Path(__file__).parent.parent


LAUNCH = ROOT / "launch"


BINARIES = Path(sys.executable).parent


INTERFACES = ("first0", "second0")


ADDRESSES = ("10.213.7.1", "10.213.7.2")


TIMEOUT_SECONDS = 150


ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if "SOCKET_IFNAME" not in name},
    "PATH": f"{BINARIES}:{os.environ['PATH']}:/usr/sbin:/sbin",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    **NOT_COMPILED,
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
        return int(said(*self.inside(node, "cat", path)))

    def processes(self):
        return [pid for node in self.nodes for pid in said("ip", "netns", "pids", node).split()]

    def is_idle_within(self, seconds):
        deadline = time.monotonic() + seconds
        while self.processes():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True


def said(*words):
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
            said("ip", "netns", "add", node)
            made.append(node)
        first, second = (("name", i, "netns", n) for i, n in zip(INTERFACES, nodes, strict=True))
        said("ip", "link", "add", *first, "type", "veth", "peer", *second)
        for node, interface, address in zip(nodes, INTERFACES, ADDRESSES, strict=True):
            said("ip", "-n", node, "link", "set", "lo", "up")
            said("ip", "-n", node, "address", "add", f"{address}/24", "dev", interface)
            said("ip", "-n", node, "link", "set", interface, "up")
        yield Network(nodes)
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split())
        pytest.skip(f"network namespaces are not allowed here: {reason}")
    finally:
        for node in made:
            for pid in said("ip", "netns", "pids", node).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            said("ip", "netns", "delete", node)


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
