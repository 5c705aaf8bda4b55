"""`spectral-ds check`: whether all nodes of a training have the same packages and configuration.

Started once on each node. Node 0 opens a TCPStore; every node puts what it has there, node 0
compares, and every node prints what it has found and ends with the same status. Node 0 closes the
store when the others have read it. The training's own store is another one and needs another port:
a node that is done sooner than node 0 would find this one there.
"""

import argparse
import datetime
import hashlib
import importlib
import importlib.resources
import json
import math
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spectral_ds.attach.runner import VARIABLE
from spectral_ds.cli.arguments import add_command
from spectral_ds.cli.errors import UserError
from spectral_ds.cli.packages import installed_version
from spectral_ds.coactivation import content_of
from spectral_ds.config import KEEP, LEARN, SECTION, SpectralConfigError, load_config, read_json

PACKAGES = ("spectral-ds", "torch", "deepspeed", "transformers", "torch-sparse")
SOURCES = (".py", ".yaml")
# Beyond what node 0 waits for nodes that do not come; how long it waits for those to read.
GRACE_SECONDS = 10.0
POLL_SECONDS = 0.1
# Differences of one node that are listed; the others are counted.
MOST_LISTED = 10
EXAMPLES = """examples, on two nodes:
  spectral-ds check --nodes 2 --node-rank 0 --master-addr a --master-port 29501 --config ds.json
  spectral-ds check --nodes 2 --node-rank 1 --master-addr a --master-port 29501 --config ds.json
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(
        commands,
        "check",
        run,
        summary="before a training on several nodes: do all have the same packages and config",
        description="Started on every node, compares Python, packages, the source of spectral_ds "
        "and the configuration\nwith those of node 0, and files whose activations it keeps or "
        "learns. All nodes print the same;\nexit status 0, or 1 on all if something differs or a "
        "node does not come. launch/multinode.sh\ndoes it.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("--nodes", type=int, required=True, help="how many there are")
    add("--node-rank", type=int, required=True, help="which one this is, from 0")
    add("--master-addr", required=True, help="name or address of node 0")
    add("--master-port", type=int, required=True, help="free there, and not the training's")
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"DeepSpeed JSON, or YAML of the section; {VARIABLE} goes over its section",
    )
    add(
        "--same",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="something else that must be equal on all nodes; may be given several times",
    )
    add("--timeout", type=float, default=600.0, help="seconds to wait for nodes (default: 600)")
    add("--json", action="store_true", help="print JSON, and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Compare this node with the others."""
    _refuse_impossible(arguments)
    here = look_here(arguments.nodes, arguments.config, arguments.same)
    place = arguments.master_addr, arguments.master_port
    rendezvous = _Rendezvous(arguments.nodes, arguments.node_rank, place, arguments.timeout)
    result = rendezvous.result(here)
    if arguments.json:
        sys.stdout.write(json.dumps(asdict(result), indent=2) + "\n")
    elif result.problems:
        # One write, or those of several nodes get mixed on one terminal.
        lines = "".join(f"\n  {problem}" for problem in result.problems)
        sys.stderr.write(f"spectral-ds check: these nodes cannot train together:{lines}\n")
    elif arguments.node_rank == 0:
        print(f"spectral-ds check: {_agreement(here, result)}")
    return 1 if result.problems else 0


def _refuse_impossible(arguments: argparse.Namespace) -> None:
    nodes, rank, port = arguments.nodes, arguments.node_rank, arguments.master_port
    if nodes < 1:
        raise UserError(f"--nodes {nodes}: must be at least 1")
    if not 0 <= rank < nodes:
        raise UserError(f"--node-rank {rank}: must be from 0 to {nodes - 1}, below --nodes")
    if not 1 <= port <= 65535:
        raise UserError(f"--master-port {port}: must be from 1 to 65535")
    if not 0 < arguments.timeout < math.inf:
        raise UserError(f"--timeout {arguments.timeout:g}: must be above 0 and finite")


@dataclass(frozen=True)
class TrainingNode:
    """What a node has.

    Attributes:
        host: its name.
        values: value by name; all are compared.
        trouble: what it could not read, one line each.
    """

    host: str
    values: dict[str, str]
    trouble: list[str]


@dataclass(frozen=True)
class CheckResult:
    """What all nodes are told: their host names, None for one that did not come; what is wrong."""

    hosts: list[str | None]
    problems: list[str]


def look_here(nodes: int, config: Path | None = None, same: Sequence[str] = ()) -> TrainingNode:
    """What this node has.

    Args:
        nodes: how many nodes it was told there are.
        config: a DeepSpeed JSON, or YAML of the section.
        same: further values, each "name=value".

    Raises:
        UserError: one of `same` has no "=".
    """
    values = {"--nodes": str(nodes)}
    for each in same:
        name, sign, value = each.partition("=")
        if not sign or name == "python" or name in PACKAGES:
            raise UserError(f"--same {each}: must be NAME=VALUE, and not what is compared anyway")
        values[name] = value
    values["python"] = platform.python_version()
    values |= {name: installed_version(name) or "not installed" for name in PACKAGES}
    # Editable installations of different sources have the same version.
    values |= dict(_digests(Path(str(importlib.resources.files("spectral_ds")))))
    trouble = []
    try:
        found = _configuration(config)
        values |= dict(_flat(found))
        values |= dict(_inputs(found.get(SECTION, {})))
    except SpectralConfigError as error:
        trouble = str(error).splitlines()
    return TrainingNode(platform.node(), values, trouble)


def _digests(package: Path) -> Iterator[tuple[str, str]]:
    """Name and digest of each source file of the package."""
    for path in sorted(package.rglob("*")):
        if path.suffix in SOURCES and path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            yield path.relative_to(package.parent).as_posix(), f"SHA-256 {digest[:12]}"


def _configuration(path: Path | None) -> dict[str, Any]:
    """The file as DeepSpeed reads it, with the section resolved: presets and defaults in it."""
    content: Any = {}
    source: Any = os.environ.get(VARIABLE) or None
    if path is not None and path.suffix.lower() in (".yaml", ".yml"):
        source = source or path
    elif path is not None:
        content = read_json(path)
        if not isinstance(content, Mapping):
            raise SpectralConfigError(f"{path}: does not hold a JSON object")
        if source is None and SECTION in content:
            source = {SECTION: content[SECTION]}
    if source is None:
        return dict(content)
    return {**content, SECTION: asdict(load_config(source))}


def _inputs(section: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and digest of each file or folder that a graph of activations looks at.

    Raises:
        SpectralConfigError: there is none, or it cannot be read.
    """
    if not section.get("enabled", True):  # nothing is attached then
        return
    graphs = {f"graphs[{i}]": graph for i, graph in enumerate(section.get("graphs", ()))}
    for key, graph in (graphs or {"graph": section.get("graph", {})}).items():
        for index, edge in enumerate(graph.get("edges", ())):
            for name, words in {"keep": KEEP, "learn": LEARN}.items():
                source = edge[name]
                if source in words:
                    continue
                path, full = Path(source), f"{SECTION}.{key}.edges[{index}].{name}"
                if not path.exists():
                    raise SpectralConfigError(f'{full} = "{source}": no such file or folder')
                try:
                    content = content_of(path)
                except OSError as error:
                    reason = f"cannot be read: {error.strerror or error}"
                    raise SpectralConfigError(f'{full} = "{source}": {reason}') from error
                yield f"content of {source}", f"SHA-256 {content[:12]}"


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Each number, text and so on in nested dicts and lists, as JSON, by its path."""
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from _flat(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple) and value:
        for index, part in enumerate(value):
            yield from _flat(part, f"{key}[{index}]")
    elif key:
        yield key, json.dumps(value, default=repr, ensure_ascii=False)


def compare(nodes: Sequence[TrainingNode | None], timeout: float) -> CheckResult:
    """Compare all nodes with node 0.

    Args:
        nodes: by rank; None for one that did not come within `timeout` seconds. Node 0 came.
    """
    first = nodes[0]
    assert first is not None, "node 0 compares"
    problems = [f"node 0 ({first.host}): {line}" for line in first.trouble]
    for rank, node in enumerate(nodes[1:], 1):
        if node is None:
            problems.append(f"node {rank} did not come within {timeout:g} s")
            continue
        own = [line for line in node.trouble if line not in first.trouble]
        own += [
            f"{name} is {_value(node, name)}, on node 0 ({first.host}) {_value(first, name)}"
            for name in [*first.values, *(name for name in node.values if name not in first.values)]
            if node.values.get(name) != first.values.get(name)
            # What the one could not read is said already.
            and (name in first.values or not first.trouble)
            and (name in node.values or not node.trouble)
        ]
        problems += [f"node {rank} ({node.host}): {line}" for line in own[:MOST_LISTED]]
        if len(own) > MOST_LISTED:
            problems.append(f"node {rank} ({node.host}): {len(own) - MOST_LISTED} more differences")
    return CheckResult([None if node is None else node.host for node in nodes], problems)


def _value(node: TrainingNode, name: str) -> str:
    return node.values.get(name, "absent")


def _agreement(here: TrainingNode, result: CheckResult) -> str:
    versions = ", ".join(f"{name} {here.values[name]}" for name in ("python", *PACKAGES))
    count = len(result.hosts)
    agree = "1 node: " if count == 1 else f"{count} nodes agree: "
    has_section = any(name.startswith(f"{SECTION}.") for name in here.values)
    return agree + versions + ("" if has_section else f'; no configuration with "{SECTION}"')


class _Rendezvous:
    """The nodes' TCPStore, seen from one of them."""

    def __init__(self, nodes: int, rank: int, place: tuple[str, int], timeout: float) -> None:
        self.nodes, self.rank, self.place, self.timeout = nodes, rank, place, timeout
        self.deadline = time.monotonic() + timeout

    def result(self, here: TrainingNode) -> CheckResult:
        """Put this node's part there and take the result.

        Raises:
            UserError: the place or the rank is another's.
        """
        reason = self._why_no_answer()
        if reason is not None and self.rank == 0:
            raise UserError(f"--master-addr {self.place[0]}: {reason}")
        if reason is not None:
            return self._without_node_0(f"no answer from {self._address}: {reason}")
        try:
            store = self._open()
            if store.add(f"came {self.rank}", 1) > 1:
                raise UserError(f"--node-rank {self.rank}: another node has come as this one")
            store.set(f"node {self.rank}", json.dumps(asdict(here)))
            return self._compared(store) if self.rank == 0 else self._told(store)
        except RuntimeError as error:  # torch's errors of stores and connections
            reason = str(error).splitlines()[0].partition(" Exception raised from")[0]
            raise UserError(f"the store at {self._address}: {reason}") from error

    @property
    def _address(self) -> str:
        return "--master-addr {} --master-port {}".format(*self.place)

    def _without_node_0(self, reason: str) -> CheckResult:
        problem = f"node 0 did not come within {self.timeout:g} s ({reason})"
        return CheckResult([None] * self.nodes, [problem])

    def _open(self) -> Any:
        dist: Any = importlib.import_module("torch.distributed")
        host, port = self.place
        left = datetime.timedelta(seconds=max(self.deadline - time.monotonic(), 1.0))
        is_server = self.rank == 0
        return dist.TCPStore(host, port, None, is_server, timeout=left, wait_for_workers=False)

    def _why_no_answer(self) -> str | None:
        """Wait until node 0 listens, and on node 0 until its name is known.

        Torch would wait too, but loudly.

        Returns:
            None, or why that is not so.
        """
        while True:
            try:
                if self.rank == 0:
                    socket.getaddrinfo(*self.place)
                    return None
                with socket.create_connection(self.place, timeout=2.0):
                    return None
            except OSError as error:  # it has not started, or its name is not known yet
                reason = error.strerror or str(error)
            except UnicodeError as error:  # no host can have this name
                return str(error)
            if time.monotonic() > self.deadline:
                return reason
            time.sleep(POLL_SECONDS)

    def _compared(self, store: Any) -> CheckResult:
        """Wait for the others, compare, and tell them; for node 0."""
        keys = [f"node {rank}" for rank in range(self.nodes)]
        while not store.check(keys) and time.monotonic() < self.deadline:
            time.sleep(POLL_SECONDS)
        came = [key if store.check([key]) else None for key in keys]
        nodes = [
            None if key is None else TrainingNode(**json.loads(store.get(key))) for key in came
        ]
        result = compare(nodes, self.timeout)
        store.set("result", json.dumps(asdict(result)))
        until = time.monotonic() + GRACE_SECONDS
        others = sum(node is not None for node in nodes) - 1
        while store.add("read", 0) < others and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
        return result

    def _told(self, store: Any) -> CheckResult:
        """Wait for the result of node 0, which gives up by itself; for the others."""
        until = time.monotonic() + self.timeout + GRACE_SECONDS
        while not store.check(["result"]):
            if time.monotonic() > until:
                return self._without_node_0(f"another program may be at {self._address}")
            time.sleep(POLL_SECONDS)
        result = CheckResult(**json.loads(store.get("result")))
        store.add("read", 1)
        return result
