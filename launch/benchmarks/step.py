"""Times whole training steps with the plugin and without, in one run, and says what it adds.

In:  a model's shapes with random weights, an engine, and presets; `paper@bfloat16` exchanges
     numbers of that dtype. Under torchrun the model is sharded over the ranks. `naive` is without
     shards: every rank gathers whole gradients, filters them by dense matrices, keeps its part.
Out: by preset, what the plugin adds to a step on the slowest rank, by kind of step and on average
     at the preset's own intervals; bytes sent; memory at the peak beyond that of a step without.

    python launch/benchmarks/step.py --tokens 512 [--json FILE]
    torchrun --nproc_per_node 2 launch/benchmarks/step.py --engine zero3 --methods retain naive
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import MODELS, SMALLEST, blocks_of, make_model
from naive import Naive
from sheet import Sheet
from timing import Clock, said
from tqdm import tqdm
from training import ENGINES, Place, Training, is_first, largest, section_of, start

import spectral_ds
from spectral_ds.cli.compare.memory import MemoryMeter

# Intervals of what is measured, the same for all presets; the first cycle also imports and builds.
# Cycles are whole: an engine may count on from one method to the next.
MONITORED, DRAWN = 4, 8
STEPS = 3 * DRAWN
# Of methods without kinds of steps.
PLAIN_STEPS = DRAWN
OFF, NAIVE = "off", "naive"


@dataclass(frozen=True)
class Found:
    """What was measured of one method, on this rank.

    Attributes:
        rest, own: seconds of each step: without the plugin, and of the plugin.
        memory: bytes at the peak, beyond those before training; None where that cannot be told.
        sent: bytes that all ranks send in a step.
        intervals: steps from one that is monitored, and from one with figures, to the next.
    """

    rest: list[float]
    own: list[float]
    memory: int | None
    sent: int
    intervals: tuple[int, int] | None


def measure(method: str, training: Training, clock: Clock, tokens: int, vocabulary: int) -> Found:
    """Train with one method, and without it afterwards."""
    device = training.place.device
    intervals, sent, steps = None, 0, PLAIN_STEPS
    end: Callable[[], None] = lambda: None  # noqa: E731
    meter = MemoryMeter(device)
    if method == NAIVE:
        naive = Naive(training.adapter(), clock)
        sent, end = naive.bytes_sent, naive.remove
    elif method != OFF:
        preset = spectral_ds.load_config(section_of(method))
        intervals = preset.monitor.interval, preset.monitor.figures_interval
        section = {
            **section_of(method),
            "monitor": {"interval": MONITORED, "figures_interval": DRAWN},
            "statistics": {"interval": min(MONITORED, preset.statistics.interval)},
        }
        plugin = training.attach(section)
        sent, end = plugin.stack.bytes_sent(preset.filter.strength), plugin.detach
        steps = STEPS
    rest, own = [], []
    try:
        for _ in tqdm(range(steps), desc=method, leave=False, disable=not is_first()):
            batch = torch.randint(vocabulary, (1, tokens), device=device)
            with clock.around() as seconds:
                training.step(batch)
                rest.append(seconds())
            own.append(clock.seconds)
    finally:  # the others are measured all the same
        end()
    return Found(rest, own, meter.peak(), sent, intervals)


def mean_of_slowest(values: Sequence[float]) -> float:
    """Mean of the values of the slowest rank (collective)."""
    return largest(sum(values) / len(values))


def by_kind(own: Sequence[float], every: int, drawn: int) -> dict[str, float]:
    """The plugin's seconds on each kind of step, and their mean (collective).

    Args:
        own: the plugin's seconds of each step.
        every: the preset's steps from one monitored step to the next.
        drawn: its steps from one with figures to the next, of which the mean is taken.
    """
    # Which steps are of a kind, the first cycle aside, and how often it is among `drawn` steps.
    steps = range(DRAWN, STEPS)
    kinds = {
        "with figures": ([s for s in steps if s % DRAWN == 0], 1),
        "monitored": ([s for s in steps if s % MONITORED == 0 < s % DRAWN], drawn // every - 1),
        "the step after": ([s for s in steps if s % MONITORED == 1], drawn // every),
        "any other": ([s for s in steps if s % MONITORED > 1], drawn - 2 * (drawn // every)),
    }
    seconds = {kind: mean_of_slowest([own[s] for s in found]) for kind, (found, _) in kinds.items()}
    total = sum(seconds[kind] * count for kind, (_, count) in kinds.items())
    return {**seconds, "mean": total / drawn}


def row_of(method: str, found: Found, off: Found) -> dict[str, Any]:
    """One of the table (collective)."""
    half = len(found.rest) // 3
    rest = mean_of_slowest(found.rest[half:])
    kinds = dict.fromkeys(("with figures", "monitored", "the step after"))
    if found.intervals is None:
        seconds = mean_of_slowest(found.own[half:])
        kinds |= {"any other": seconds, "mean": seconds}
    else:
        kinds |= by_kind(found.own, *found.intervals)
    memory = None
    if found.memory is not None and off.memory is not None:
        memory = largest(found.memory - off.memory) / 2**20
    mean = kinds["mean"] or 0.0
    return {
        "": method,
        "a step without, s": rest,
        **kinds,
        "any other, %": 100 * (kinds["any other"] or 0.0) / rest,
        "mean, %": 100 * mean / rest,
        "sent, MB": found.sent / 1e6,
        "memory, MiB": memory,
    }


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default=SMALLEST)
    parser.add_argument("--blocks", type=int, help="default: as many as the model has")
    parser.add_argument("--tokens", type=int, default=512, help="of a rank")
    parser.add_argument("--engine", choices=ENGINES, default="plain")
    parser.add_argument("--methods", nargs="+", default=["retain", "paper", "observe"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> None:
    """Measures everything in one run and prints the table."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = start(arguments.device)
    blocks = arguments.blocks or blocks_of(arguments.model)
    clock = Clock(device)
    clock.watch_plugin()
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(arguments.model, device, num_hidden_layers=blocks)
        elements = sum(parameter.numel() for parameter in model.parameters())
        place = Place(device, arguments.engine, arguments.bf16)
        training = Training(model, place, folder)
        given = clock, arguments.tokens, model.config.vocab_size
        measure(OFF, training, *given)  # warms up, and allocates what the optimizer keeps
        off = measure(OFF, training, *given)
        rows.append(row_of(OFF, off, off))
        for method in arguments.methods:
            try:
                found = measure(method, training, *given)
            except Exception as error:
                failed[method] = said(error)
                if dist.is_initialized():  # ranks may have left each other
                    break
            else:
                rows.append(row_of(method, found, off))
    if is_first():
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        sheet = Sheet(
            "step",
            device,
            f"{elements / 1e6:.1f} M elements in the shapes of {arguments.model}, "
            f"{arguments.engine}, {ranks} ranks, {arguments.tokens} tokens a rank, "
            f"{'bfloat16' if arguments.bf16 else 'fp32'}",
        )
        sheet.add("What the plugin adds to a step", rows)
        if failed:
            sheet.add("Failed", [{"": name, "why": why} for name, why in failed.items()])
        sheet.close(arguments.json)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
