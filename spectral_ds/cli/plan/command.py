"""`spectral-ds plan`: what a configuration takes of each rank, from a model's shapes alone.

Nothing is trained and no weight is loaded: a 70B model on 1,024 ranks is planned on a laptop.
"""

import argparse
import json
import os
import sys
from typing import Any

from spectral_ds.cli.arguments import above_zero, add_command, at_least
from spectral_ds.cli.errors import UserError
from spectral_ds.config import PRESETS, SpectralConfig, load_config

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
    parser = add_command(
        commands,
        "plan",
        run,
        summary="bytes, memory and time of a configuration on any number of ranks, from shapes",
        description="Says what each rank would send, store and compute, before anything starts.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("--model", metavar="MODEL", required=True,
        help="folder, .gguf, hub name, or llama-3-8b, llama-3-70b, smollm2-135m")  # fmt: skip
    add("--config", metavar="FILE",
        help='YAML, DeepSpeed JSON with "spectral_ds", or a preset (default: paper)')  # fmt: skip
    add("--engine", choices=ENGINES, required=True, help="which cuts the parameters")
    add("--world-size", metavar="N", type=at_least(1), required=True, help="ranks")
    add("--nodes", metavar="K", type=at_least(1),
        help=f"machines of N/K ranks, in order (default: {RANKS_PER_NODE} ranks each)")  # fmt: skip
    add("--tokens", metavar="T", type=at_least(1), help="of a rank in one step, to compare with it")
    positive: dict[str, Any] = {"type": above_zero}
    add("--flops", metavar="TFLOPS", default=400, **positive,
        help="that a rank does a second in training (default: 400)")  # fmt: skip
    add("--bandwidth-intra", metavar="GB/s", default=300, **positive,
        help="of a rank to others on its machine (default: 300)")  # fmt: skip
    add("--bandwidth-inter", metavar="GB/s", default=40, **positive,
        help="of a rank to other machines (default: 40)")  # fmt: skip
    add("--memory-bandwidth", metavar="GB/s", default=2500, **positive,
        help="of a rank (default: 2500)")  # fmt: skip
    add("--flops-float32", metavar="TFLOPS", default=60, **positive,
        help="that a rank does a second in float32, as filters do (default: 60)")  # fmt: skip
    add("--latency", metavar="µs", default=30, **positive, help="of a collective (default: 30)")
    add("--device", choices=("cuda", "cpu"), default="cuda",
        help="where ranks compute: buckets are larger on cuda (default)")  # fmt: skip
    add("--json", action="store_true", help="print JSON, and nothing else")


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
    report = _report(arguments, config, machines)
    if arguments.json:
        sys.stdout.write(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    else:
        from spectral_ds.cli.plan.tables import show

        show(report)
    return 0


def _config(given: str | None) -> SpectralConfig:
    if given is not None and not os.path.exists(given):
        if given not in PRESETS:
            raise UserError(f"--config {given}: no such file, and no preset: {', '.join(PRESETS)}")
        return load_config({"preset": given})
    return load_config({} if given is None else given)


def _report(arguments: argparse.Namespace, config: SpectralConfig, machines: int) -> dict[str, Any]:
    import torch

    from spectral_ds.cli.plan.models import model_of
    from spectral_ds.cli.plan.report import plan_report
    from spectral_ds.geometry.buckets import bucket_elements
    from spectral_ds.planning import Cluster, EngineName, Machine, Plan, plan_configuration

    model = model_of(arguments.model)
    scalar = next((name for name, shape in model.shapes.items() if not shape), None)
    if scalar is not None and arguments.engine == "fsdp2":
        raise UserError(f"--engine fsdp2: fully_shard refuses parameters of no dimension: {scalar}")
    plan = plan_configuration(
        model,
        config,
        arguments.engine,
        Cluster(arguments.world_size, machines),
        Machine(
            intra=arguments.bandwidth_intra * 1e9,
            inter=arguments.bandwidth_inter * 1e9,
            memory=arguments.memory_bandwidth * 1e9,
            latency=arguments.latency * 1e-6,
            arithmetic=arguments.flops_float32 * 1e12,
        ),
        bucket_elements(torch.device(arguments.device)),
    )
    # ZeRO-1 and 2 cut parameters alike.
    kinds: list[EngineName] = ["zero2", "zero3"] if scalar else ["zero2", "zero3", "fsdp2"]
    same = {"zero1": "zero2"}.get(plan.engine, plan.engine)
    others: dict[EngineName, Plan] = {
        kind: plan.instead(engine=kind) for kind in kinds if kind != same
    }
    return plan_report(plan, others, arguments.tokens, arguments.flops * 1e12)
