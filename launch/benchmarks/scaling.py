"""Measures a filter on more and more ranks beside what `spectral-ds plan` says it takes.

In:  a configuration, and a model's shapes with random weights, cut by FSDP2 or as ZeRO-1/2 do.
Out: by number of ranks, the bytes that they send in a step, the share of the gradient that this is,
     memory of the rank that needs most, and the plugin's time on the slowest; each beside the
     plan's, which is made for the bandwidths and the arithmetic that this machine has just shown.
     Of `paper@bfloat16`, how far what it filters is from the same exchanged in float32.

    python launch/benchmarks/scaling.py [--ranks 1 2 4 8] [--presets paper retain] [--json FILE]
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from models import MODELS, SMALLEST, make_model
from sheet import Sheet
from timing import Clock, ready
from tqdm import tqdm
from training import Place, Training, largest, section_of, start

from spectral_ds import SpectralPlugin
from spectral_ds.config import load_config
from spectral_ds.geometry.buckets import bucket_elements
from spectral_ds.planning import Cluster, Machine, Model, Plan, plan_configuration

FLOAT = 4  # bytes
WORDS = 512  # embeddings are not filtered
ENGINES = ("fsdp2", "zero2", "zero3")
TOKENS = 16  # of a step: what the plugin does depends on none
# What the machine shows itself by: a tensor in no cache, matrices that arithmetic bounds, and what
# is sent to each other rank.
COPIED, SIDE, SENT = 2**25, 1024, 2**20
REPEATS = 5


def slowest(action: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """The least seconds of an action, on the rank where that is most (collective)."""
    least = float("inf")
    for _ in range(repeats + 1):
        if dist.get_world_size() > 1:
            dist.barrier()
        started = ready(device)
        action()
        least = min(least, ready(device) - started)
    return largest(least)


def show_machine(device: torch.device) -> Machine:
    """What a rank's hardware gives while all ranks want it (collective)."""
    ranks = dist.get_world_size()
    source = torch.randn(COPIED, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(SIDE, SIDE, device=device)
    product = torch.empty_like(matrix)
    send, receive = (torch.zeros(ranks * SENT, device=device) for _ in range(2))
    little, back = (torch.zeros(ranks, device=device) for _ in range(2))
    seconds_of_copy = slowest(lambda: target.copy_(source), device)
    seconds_of_product = slowest(lambda: torch.mm(matrix, matrix, out=product), device)
    found = {
        "memory": 2 * FLOAT * COPIED / seconds_of_copy,
        "arithmetic": 2 * SIDE**3 / seconds_of_product,
    }
    if ranks > 1:
        latency = slowest(lambda: dist.all_to_all_single(back, little), device)
        seconds = slowest(lambda: dist.all_to_all_single(receive, send), device)
        bandwidth = FLOAT * (ranks - 1) * SENT / max(seconds - latency, 1e-9)
        found |= {"intra": bandwidth, "inter": bandwidth, "latency": latency}
    return Machine(**found)


def held(device: torch.device) -> int:
    """Bytes of all tensors."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    kinds = torch.Tensor, torch.nn.Parameter  # others only wrap some of these
    tensors = [thing for thing in gc.get_objects() if type(thing) in kinds]
    storages = [each.untyped_storage() for each in tensors if each.layout == torch.strided]
    return sum({each._cdata: each.nbytes() for each in storages}.values())


def filtered(plugin: SpectralPlugin) -> torch.Tensor:
    """The filter of random numbers, in the elements that this rank owns (collective)."""
    device = plugin.engine.communicator.device
    drawn = torch.Generator(device).manual_seed(dist.get_rank())
    signal = [
        torch.randn(fragment.length, device=device, generator=drawn) if is_filtered else None
        for fragment, is_filtered in zip(
            plugin.engine.fragments, plugin.stack.is_filtered, strict=True
        )
    ]
    plugin.stack.filter.apply(signal, plugin.config.filter.warmup_steps)
    return torch.cat([torch.empty(0, device=device), *(x for x in signal if x is not None)])


def rounding(training: Training, preset: str) -> float | None:
    """Norm of the difference from the same exchanged in float32, over its norm (collective).

    None of what is exchanged in float32.
    """
    name, _, dtype = preset.partition("@")
    if not dtype:
        return None
    found = []
    for method in (name, preset):
        plugin = training.attach({**section_of(method), "monitor": {"enabled": False}})
        found.append(filtered(plugin))
        plugin.detach()
    exact, rounded = found
    squares = torch.stack([(rounded - exact).square().sum(), exact.square().sum()]).double()
    dist.all_reduce(squares)
    return float((squares[0] / squares[1]).sqrt())


def measure(
    preset: str, training: Training, clock: Clock, plan_of: Callable[[Any, Machine], Plan]
) -> dict[str, Any]:
    """One row (collective)."""
    device, ranks = training.place.device, dist.get_world_size()
    section = {**section_of(preset), "monitor": {"enabled": False}}
    config = load_config(section)
    plan = plan_of(config, show_machine(device))
    training.step(torch.randint(WORDS, (1, TOKENS), device=device))
    error = rounding(training, preset)
    before = held(device)
    plugin = training.attach(section)
    seconds = []
    for _ in range(REPEATS):
        with clock.around():
            training.step(torch.randint(WORDS, (1, TOKENS), device=device))
        seconds.append(clock.seconds)
    memory = held(device) - before
    sent = plugin.stack.bytes_sent(config.filter.strength)
    plugin.detach()
    return {
        "preset": preset,
        "ranks": ranks,
        "sent, MB": sent / 1e6,
        "planned, MB": plan.bytes_sent / 1e6,
        "error, %": None if error is None else 100 * error,
        "of the gradient": sent / (FLOAT * float(plan.elements.sum())),
        "memory, MiB": largest(memory) / 2**20,
        "planned, MiB": float(np.sum([*plan.device_memory.values()], axis=0).max()) / 2**20,
        "a step, ms": 1e3 * largest(min(seconds)),
        "planned, ms": 1e3 * float(plan.seconds.max()),
    }


def work(arguments: argparse.Namespace) -> None:
    """What each rank does: a row of each preset into the file, by rank 0."""
    device = start(arguments.device)
    torch.set_num_threads(1 if device.type == "cpu" else torch.get_num_threads())
    name, blocks = arguments.model, arguments.blocks
    model = make_model(name, device, num_hidden_layers=blocks, vocab_size=WORDS)
    facts = Model.of(name, model)
    cluster, size = Cluster(dist.get_world_size(), 1), bucket_elements(device)

    def plan_of(config: Any, machine: Machine) -> Plan:
        return plan_configuration(facts, config, arguments.engine, cluster, machine, size)

    clock = Clock(device)
    clock.watch_plugin()
    with tempfile.TemporaryDirectory() as folder:
        training = Training(model, Place(device, arguments.engine, in_bf16=False), folder)
        rows = [measure(preset, training, clock, plan_of) for preset in arguments.presets]
    if dist.get_rank() == 0:
        arguments.json.write_text(json.dumps(rows), "utf-8")
    dist.barrier()
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default=SMALLEST)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--engine", choices=ENGINES, default="fsdp2")
    parser.add_argument("--presets", nargs="+", default=["paper", "gradient_smoothing", "retain"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def run_ranks(ranks: int, arguments: list[str], path: Path) -> list[dict[str, Any]]:
    """The rows of so many ranks.

    Raises:
        RuntimeError: they failed.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node", str(ranks), __file__, *arguments, "--json", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line]
        raise RuntimeError(errors[0] if errors else f"status {done.returncode}")
    rows: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
    return rows


def main() -> None:
    """Starts ranks and prints the tables; or is one of them."""
    arguments = parse_arguments()
    if "RANK" in os.environ:
        work(arguments)
        return
    device = torch.device(arguments.device)
    sizes = arguments.ranks
    if device.type == "cuda":
        sizes = [size for size in sizes if size <= torch.cuda.device_count()]
    given = ["--model", arguments.model, "--blocks", str(arguments.blocks), "--engine",
             arguments.engine, "--device", arguments.device,
             "--presets", *arguments.presets]  # fmt: skip
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for size in tqdm(sizes, desc="ranks", leave=False):
            try:
                rows += run_ranks(size, given, Path(folder) / "rows.json")
            except RuntimeError as error:  # the others are measured all the same
                failed.append({"ranks": size, "why": str(error)})
    shared = f"{os.cpu_count()} cores for all ranks" if device.type == "cpu" else "a device a rank"
    sheet = Sheet(
        "scaling",
        device,
        f"{arguments.blocks} blocks of {arguments.model}, cut by {arguments.engine}; {shared}",
    )
    for preset in arguments.presets:
        own = [{k: v for k, v in row.items() if k != "preset"} for row in rows
               if row["preset"] == preset]  # fmt: skip
        sheet.add(f"preset: {preset}", own)
    if failed:
        sheet.add("Failed", failed)
    sheet.close(arguments.json)


if __name__ == "__main__":
    main()
