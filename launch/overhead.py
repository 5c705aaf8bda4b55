"""Times what the plugin adds to whole training steps, in one run, and prints its share.

In:  --preset, --blocks and --tokens a rank, of a Llama in SmolLM2-135M's shapes with random
     weights. Under torchrun the model is sharded by FSDP2, or by ZeRO with --zero STAGE.
Out: mean seconds of a step less the plugin, of the plugin on steps with figures, on monitored and
     on other steps, and its mean at the preset's own intervals, on the slowest rank.

    python launch/overhead.py --preset observe --tokens 512
    torchrun --nproc_per_node 2 launch/overhead.py --preset paper --zero 3
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import spectral_ds

# Intervals of what is measured, the same for all presets; the first cycle also imports and builds.
MONITORED, DRAWN = 4, 8
STEPS = 3 * DRAWN + 2


def make_model(blocks: int, device: torch.device) -> torch.nn.Module:
    """A Llama in SmolLM2-135M's shapes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with device:
        return LlamaForCausalLM(config)


class Clock:
    """Seconds since the start, once the device has nothing left to do."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def time_plugin(clock: Clock) -> list[float]:
    """Seconds of each of the plugin's calls, as they come."""
    times: list[float] = []

    def timed(call: Callable[[Any], None]) -> Callable[[Any], None]:
        def run(plugin: Any) -> None:
            started = clock()
            call(plugin)
            times.append(clock() - started)

        return run

    for name in ("begin_step", "before_step", "after_update"):
        call = getattr(spectral_ds.SpectralPlugin, name)
        setattr(spectral_ds.SpectralPlugin, name, timed(call))
    return times


# One optimizer step on a batch of token ids.
Step = Callable[[torch.Tensor], None]


def by_torch(model: Any, section: dict[str, Any], folder: str) -> Step:
    """Attach to one process, or to FSDP2 under torchrun."""
    if dist.is_initialized():
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    writer = SummaryWriter(folder) if is_first() else None
    spectral_ds.attach(model, optimizer, section, writer=writer)

    def step(batch: torch.Tensor) -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_deepspeed(model: torch.nn.Module, section: dict[str, Any], folder: str, stage: int) -> Step:
    """Initialize DeepSpeed with the plugin."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "tensorboard": {"enabled": True, "output_path": folder, "job_name": "overhead"},
        "spectral_ds": section,
    }
    parameters = list(model.parameters())
    engine, *_ = spectral_ds.initialize(model=model, model_parameters=parameters, config=config)

    def step(batch: torch.Tensor) -> None:
        engine.backward(engine(input_ids=batch, labels=batch).loss)
        engine.step()

    return step


def measure(
    step: Step, tokens: int, times: list[float], clock: Clock, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of each step less the plugin, and those of the plugin."""
    rest, own = [], []
    for _ in tqdm(range(STEPS), desc="steps", leave=False, disable=not is_first()):
        batch = torch.randint(49152, (1, tokens), device=device)
        times.clear()
        started = clock()
        step(batch)
        ended = clock()
        own.append(sum(times))
        rest.append(ended - started - own[-1])
    return rest, own


def is_first() -> bool:
    """Whether this rank is the one that speaks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def mean_of_slowest(values: list[float]) -> float:
    """Mean of the values of the slowest rank; a collective call."""
    found = torch.tensor(sum(values) / len(values), dtype=torch.float64)
    if dist.is_initialized():
        found = found.to("cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="observe")
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--zero", type=int, choices=range(4), help="by DeepSpeed, of this stage")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def start() -> torch.device:
    """This rank's device, once the process group is there if a launcher started several."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def by_kind(own: list[float], every: int, drawn: int) -> dict[str, float]:
    """The plugin's seconds on each kind of step, and their mean; a collective call.

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
        "after a monitored one": ([s for s in steps if s % MONITORED == 1], drawn // every),
        "other": ([s for s in steps if s % MONITORED > 1], drawn - 2 * (drawn // every)),
    }
    seconds = {kind: mean_of_slowest([own[s] for s in found]) for kind, (found, _) in kinds.items()}
    total = sum(seconds[kind] * count for kind, (_, count) in kinds.items())
    return {**seconds, f"mean of {drawn} steps": total / drawn}


def main() -> None:
    """Measures everything in one run and prints the table."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = start()
    preset = spectral_ds.load_config({"preset": arguments.preset})
    every, drawn = preset.monitor.interval, preset.monitor.figures_interval
    model = make_model(arguments.blocks, device)
    elements = sum(parameter.numel() for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        section = {
            "preset": arguments.preset,
            "monitor": {"interval": MONITORED, "figures_interval": DRAWN},
            "statistics": {"interval": min(MONITORED, preset.statistics.interval)},
        }
        clock = Clock(device)
        times = time_plugin(clock)
        if arguments.zero is None:
            step = by_torch(model, section, folder)
        else:
            step = by_deepspeed(model, section, folder, arguments.zero)
        rest, own = measure(step, arguments.tokens, times, clock, device)

    rest_of_step = mean_of_slowest(rest[DRAWN:])
    seconds = by_kind(own, every, drawn)
    if is_first():
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        engine = "torch" if arguments.zero is None else f"ZeRO-{arguments.zero}"
        print(
            f"{elements / 1e6:.1f} M elements, {engine}, {ranks} ranks of {arguments.threads} "
            f"threads, {device.type}, {arguments.tokens} tokens a rank, preset {arguments.preset}, "
            f"monitored every {every} steps, figures every {drawn}\n"
        )
        print(f"{'a step, less the plugin':34} {rest_of_step:9.4f} s")
        for kind, value in seconds.items():
            share = 100 * value / rest_of_step
            print(f"{f'plugin: {kind}':34} {value:9.4f} s  {share:7.2f} % of a step")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
