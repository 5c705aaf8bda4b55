"""`spectral-ds plan`: what a configuration takes of each rank, from a model's shapes alone.

Nothing is trained and no weight is loaded: a 70B model on 1,024 ranks is planned on a laptop.
"""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from spectral_ds.cli.errors import UserError
from spectral_ds.config import PRESETS, SpectralConfig, load_config

if TYPE_CHECKING:
    from rich.table import Table

ENGINES = ("zero1", "zero2", "zero3", "fsdp2")
# Where the number of machines is not said.
RANKS_PER_NODE = 8
EXAMPLES = """examples:
  spectral-ds plan --model llama-3-8b --engine zero3 --world-size 64
  spectral-ds plan --model ./model --config ds_config.json --engine fsdp2 --world-size 16 --nodes 4
  spectral-ds plan --model llama-3-70b --config gradient_smoothing --engine zero2 \\
      --world-size 1024 --tokens 16384 --json
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "plan",
        help="bytes, memory and time of a configuration on any number of ranks, from shapes",
        description="Says what each rank would send, store and compute, before anything starts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", metavar="MODEL", required=True,
        help="folder, .gguf, hub name, or llama-3-8b, llama-3-70b, smollm2-135m")  # fmt: skip
    add("--config", metavar="FILE",
        help='YAML, DeepSpeed JSON with "spectral_ds", or a preset (default: paper)')  # fmt: skip
    add("--engine", choices=ENGINES, required=True, help="which cuts the parameters")
    add("--world-size", metavar="N", type=_whole, required=True, help="ranks")
    add("--nodes", metavar="K", type=_whole,
        help=f"machines of N/K ranks, in order (default: {RANKS_PER_NODE} ranks each)")  # fmt: skip
    add("--tokens", metavar="T", type=_whole, help="of a rank in one step, to compare with it")
    positive = {"type": _positive}
    add("--flops", metavar="TFLOPS", default=400, **positive,
        help="that a rank does a second in training (default: 400)")  # fmt: skip
    add("--bandwidth-intra", metavar="GB/s", default=300, **positive,
        help="of a rank to others on its machine (default: 300)")  # fmt: skip
    add("--bandwidth-inter", metavar="GB/s", default=40, **positive,
        help="of a rank to other machines (default: 40)")  # fmt: skip
    add("--memory-bandwidth", metavar="GB/s", default=2500, **positive,
        help="of a rank (default: 2500)")  # fmt: skip
    add("--latency", metavar="µs", default=30, **positive, help="of a collective (default: 30)")
    add("--device", choices=("cuda", "cpu"), default="cuda",
        help="where ranks compute: buckets are larger on cuda (default)")  # fmt: skip
    add("--json", action="store_true", help="print JSON, and nothing else")
    parser.set_defaults(run=run)


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Plan a configuration.

    Raises:
        UserError: an argument cannot be used.
        SpectralConfigError: the configuration cannot.
    """
    machines = arguments.nodes or -(-arguments.world_size // RANKS_PER_NODE)
    if arguments.world_size % machines:
        raise UserError(
            f"--world-size {arguments.world_size}: does not divide among {machines} nodes; "
            "set --nodes"
        )
    config = _config(arguments.config)
    if int(os.environ.get("RANK", "0")) > 0:  # a launcher started several
        return 0
    found = _plan(arguments, config, machines)
    if arguments.json:
        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    else:
        _show(found)
    return 0


def _config(given: str | None) -> SpectralConfig:
    if given in PRESETS and not os.path.exists(given):
        return load_config({"preset": given})
    return load_config({} if given is None else given)


def _plan(arguments: argparse.Namespace, config: SpectralConfig, machines: int) -> dict[str, Any]:
    import torch

    from spectral_ds.cli.plan_models import model_of
    from spectral_ds.cli.plan_summary import summary
    from spectral_ds.geometry.buckets import bucket_elements
    from spectral_ds.planning import Cluster, EngineName, Machine, Plan, plan_configuration

    plan = plan_configuration(
        model_of(arguments.model),
        config,
        arguments.engine,
        Cluster(arguments.world_size, machines),
        Machine(
            intra=arguments.bandwidth_intra * 1e9,
            inter=arguments.bandwidth_inter * 1e9,
            memory=arguments.memory_bandwidth * 1e9,
            latency=arguments.latency * 1e-6,
        ),
        bucket_elements(torch.device(arguments.device)),
    )
    # ZeRO-1 and 2 cut parameters alike.
    kinds: list[EngineName] = ["zero2", "zero3", "fsdp2"]
    same = {"zero1": "zero2"}.get(plan.engine, plan.engine)
    others: dict[EngineName, Plan] = {
        kind: plan.instead(engine=kind) for kind in kinds if kind != same
    }
    return summary(plan, others, arguments.tokens, arguments.flops * 1e12)


def _show(found: dict[str, Any]) -> None:
    from spectral_ds.cli.plan_advice import size
    from spectral_ds.cli.report import make_console

    console = make_console()
    console.print(
        f"{found['model']}: {found['parameters']:,} parameters; {found['engine']}, "
        f"{found['world_size']:,} ranks on {found['nodes']:,} machines"
    )
    for graph in found["graphs"]:
        edges, hops = graph["edges"], graph["hops"]
        is_known = edges["least"] == edges["most"]
        range_ = "" if is_known else f" (expected; {edges['least']:,} to {edges['most']:,})"
        regularizer = "" if hops["regularizer"] is None else f" and {hops['regularizer']} more"
        products = "no" if hops["filter"] is None else hops["filter"]
        console.print(
            f"\n{graph['nodes']:,} nodes, {edges['expected']:,} edges{range_}; {products} "
            f"products with L{regularizer} a step",
            soft_wrap=True,
        )
        console.print(_groups_table(graph["groups"]))
    console.print(_ranks_table(found["per_rank"]))
    console.print(
        f"all ranks send {size(found['bytes_per_step'])} a step in at most "
        f"{found['collectives_per_step']:,} collectives; measuring spectra, signal and noise is "
        "not counted",
        soft_wrap=True,
    )
    console.print(f"\n{found['advice']}", soft_wrap=True)


def _groups_table(groups: list[dict[str, Any]]) -> "Table":
    from spectral_ds.cli.plan_advice import size
    from spectral_ds.cli.report import make_table

    table = make_table("", ("joined parameters", "meet by", "groups", "sent a step"), words=2)
    alone = [group for group in groups if group["meets"] == "local"]
    for group in groups:
        if group["meets"] != "local":
            roles = ", ".join(group["roles"])
            table.add_row(
                roles, group["meets"], f"{group['count']:,}", size(group["bytes_per_step"])
            )
    if alone:
        roles = ", ".join(dict.fromkeys(role for group in alone for role in group["roles"]))
        table.add_row(roles, "local", f"{sum(group['count'] for group in alone):,}", "0 B")
    return table


def _ranks_table(figures: dict[str, Any]) -> "Table":
    from spectral_ds.cli.plan_advice import duration, size
    from spectral_ds.cli.report import make_table

    table = make_table("", ("of a rank", "", "mean", "worst"), words=2)

    def add(part: str, name: str, both: dict[str, float], show: Any) -> None:
        table.add_row(part, name, show(both["mean"]), show(both["worst"]))

    def whole(count: float) -> str:
        return f"{count:,.0f}"

    for name in ("elements", "nodes", "edges"):
        add("graph", name, figures[name], whole)
    parts = {
        "device memory": ("device_bytes", size),
        "host memory": ("host_bytes", size),
        "boundary, a product": ("boundary_bytes_per_hop", size),
        "transpose, one way": ("transposed_bytes_per_move", size),
        "sent a step": ("bytes_per_step", size),
    }
    for part, (key, show) in parts.items():
        table.add_section()
        shown = {name: both for name, both in figures[key].items() if both["worst"]}
        for name, both in (shown or {"total": figures[key]["total"]}).items():
            add(part, name.replace("_", " "), both, show)
    table.add_section()
    add("a step", "operations", figures["flops_per_step"], lambda n: size(n).removesuffix("B"))
    add("a step", "memory traffic", figures["traffic_bytes_per_step"], size)
    for name, both in figures["seconds"].items():
        add("time", name, both, duration)
    return table
