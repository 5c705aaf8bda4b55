"""Fine-tunes a Hugging Face model with DeepSpeed ZeRO, with or without spectral_ds.

In:  a model, local text and a DeepSpeed configuration. A "spectral_ds" section in the configuration
     switches the plugin on; the training loop is the same without it.
Out: --output DIR with TensorBoard scalars, checkpoints and the model; --summary FILE with losses,
     parameter perturbation and step time.

    deepspeed --num_gpus 2 launch/finetune.py --model HuggingFaceTB/SmolLM2-135M \\
        --data reviews.tsv --deepspeed_config configs/zero2_spectral.json --output runs/mine
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from torch import Tensor
from tqdm import tqdm

import spectral_ds
from spectral_ds.checkpoint import CheckpointError
from spectral_ds.cli.arguments import at_least
from spectral_ds.cli.errors import UserError
from spectral_ds.cli.examples import (
    Batch,
    Corpus,
    batches,
    classification_examples,
    language_modelling_examples,
    load_corpus,
)
from spectral_ds.cli.models import Source, as_plain, load_tokenizer, refuse_longer
from spectral_ds.config import read_json
from spectral_ds.text import DataError


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder, name on the hub, or .gguf file")
    add("--data", required=True, type=Path, help="TSV, JSONL, plain text or datasets folder")
    add("--task", choices=["causal-lm", "classification"], default="causal-lm")
    add("--deepspeed_config", required=True, type=Path, help="DeepSpeed's JSON configuration")
    add(
        "--steps",
        type=at_least(1),
        default=100,
        help="optimizer steps in all, resumed ones included",
    )
    add("--sequence-length", type=at_least(2), default=128, help="tokens")
    add("--learning-rate", type=float, help="instead of the configuration's")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("runs/finetune"), help="folder for all results")
    add("--save-interval", type=int, default=0, help="steps between checkpoints, 0: none")
    add("--save-model", action="store_true", help="write the model to OUTPUT/model at the end")
    add("--resume", nargs="?", type=Path, const=True, metavar="CHECKPOINTS")
    add("--evaluation-batches", type=int, default=4, help="held-out batches for each rank, 0: none")
    add("--summary", type=Path, help="JSON file for the results (default OUTPUT/summary.json)")
    add("--local_rank", type=int, default=-1, help="appended by the deepspeed launcher")
    return parser.parse_args()


def end_together(error: Exception | None) -> None:
    """Ends all ranks with one message if any of them has an error; a collective call."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else str(error))
    message = next((text for text in errors if text), None)
    if message is None:
        return
    if dist.get_rank() == 0:
        print(f"finetune: {message}", file=sys.stderr, flush=True)
    dist.barrier()  # the launcher ends the other ranks as soon as one has ended
    sys.exit(1)


def load_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """The DeepSpeed configuration, with what the command line sets."""
    path = arguments.deepspeed_config
    try:
        config = read_json(path)
    except spectral_ds.SpectralConfigError as error:
        raise UserError(f"--deepspeed_config {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed_config {path}: does not hold a JSON object")
    if arguments.learning_rate is not None:
        if "optimizer" not in config:
            raise UserError("--learning-rate: the configuration has no optimizer to set it for")
        config["optimizer"].setdefault("params", {})["lr"] = arguments.learning_rate
    if config.get("tensorboard", {}).get("enabled"):
        config["tensorboard"].setdefault("output_path", str(arguments.output))
        config["tensorboard"].setdefault("job_name", "tensorboard")
    return config


def load_model(arguments: argparse.Namespace, num_classes: int) -> tuple[Any, Any]:
    """The model in fp32 and its tokenizer."""
    kind: Any = transformers.AutoModelForCausalLM
    head = {}
    if arguments.task == "classification":
        kind = transformers.AutoModelForSequenceClassification
        head = {"num_labels": num_classes}
    try:
        source = Source.of(arguments.model)
        tokenizer = load_tokenizer(source)
        model = source.load(kind, dtype=torch.float32, **head)
    except UserError as error:
        raise UserError(f"--model {error}") from error
    model = as_plain(model)  # or it would not be saved
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    refuse_longer(arguments.sequence_length, model)
    return model, tokenizer


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay, if any, for matrices, none for biases and normalization weights."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if weight_decay == 0:
        return [{"params": trainable}]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


class Reference:
    """The weights at construction, each rank keeping every world-size-th parameter in fp32."""

    def __init__(self, engine: Any) -> None:
        """Copies the weights; a collective call under ZeRO-3."""
        self.engine = engine
        self.copies = dict(self._mine())

    def _mine(self) -> Iterator[tuple[str, Tensor]]:
        trainable = [(n, p) for n, p in self.engine.module.named_parameters() if p.requires_grad]
        sharded = self.engine.zero_optimization_stage() == 3
        for index, (name, parameter) in enumerate(trainable):
            with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
                if index % dist.get_world_size() == dist.get_rank():
                    yield name, parameter.detach().to("cpu", torch.float32, copy=True)

    def perturbation(self) -> float:
        """‖θ − θ_ref‖ over all trainable parameters; a collective call."""
        squares = [(now - self.copies[name]).double().square().sum() for name, now in self._mine()]
        total = torch.stack([torch.zeros((), dtype=torch.float64), *squares]).sum()
        total = total.to(self.engine.device)
        dist.all_reduce(total)
        return math.sqrt(total.item())


def mean_over_ranks(value: Tensor) -> float:
    """Mean of a scalar over all ranks; a collective call."""
    mean = value.detach().float() / dist.get_world_size()
    dist.all_reduce(mean)
    return float(mean)


def evaluate(engine: Any, held_out: list[Batch]) -> float | None:
    """Mean loss over the held-out batches of all ranks, None if there are none."""
    if not held_out:
        return None
    engine.eval()
    with torch.no_grad():
        losses = [engine(**to_device(batch, engine)).loss for batch in held_out]
    engine.train()
    return mean_over_ranks(torch.stack(losses).mean())


def to_device(batch: Batch, engine: Any) -> Batch:
    """The batch on the engine's device."""
    return {name: tensor.to(engine.device) for name, tensor in batch.items()}


def train_step(engine: Any, data: Iterator[Batch], seed: int, step: int) -> float:
    """One optimizer step over all accumulated batches; returns the mean loss over ranks."""
    # Dropout depends on seed, step and rank only, so a resumed run repeats it.
    torch.manual_seed(hash((seed, step, dist.get_rank())) % 2**63)
    losses = []
    for _ in range(engine.gradient_accumulation_steps()):
        loss = engine(**to_device(next(data), engine)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return mean_over_ranks(torch.stack(losses).mean())


def resume(engine: Any, folder: Path) -> list[float]:
    """Loads a checkpoint folder, or its newest one; returns the losses of the steps before."""
    tag = folder.name  # of one checkpoint, unless the folder has them all
    if (folder / "latest").is_file():
        tag = (folder / "latest").read_text("utf-8").strip()
    else:
        folder = folder.parent
    what = f"--resume {folder / tag}"
    found = (folder / "latest").is_file() and (folder / tag).is_dir()
    end_together(None if found else UserError(f"{what}: no checkpoint"))
    # At another, ranks of ZeRO-3 would fail one by one.
    ranks = len(list((folder / tag).glob("*zero_pp_rank_*_optim_states.pt")))
    if not engine.load_universal_checkpoint() and ranks not in (0, dist.get_world_size()):
        end_together(
            UserError(
                f"{what}: was saved at world size {ranks}, and this run has {dist.get_world_size()}"
                "; DeepSpeed resumes at another only from a universal checkpoint"
            )
        )
    error, state = None, {}
    try:
        _, state = engine.load_checkpoint(str(folder), tag=tag)
        if "losses" not in state:
            error = UserError(f"{what}: finetune.py has not saved it")
    except (CheckpointError, ZeRORuntimeException) as problem:
        error = UserError(f"{what}: {problem}")
    end_together(error)
    return list(state["losses"])


def save_model(engine: Any, tokenizer: Any, folder: Path) -> None:
    """Writes model and tokenizer for ``from_pretrained``; a collective call under ZeRO-3."""
    sharded = engine.zero_optimization_stage() == 3
    weights = dict(engine.module.named_buffers()) if dist.get_rank() == 0 else {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=sharded):
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().to("cpu", copy=True)
    if dist.get_rank() == 0:
        engine.module.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


def load_inputs(arguments: argparse.Namespace) -> tuple[dict[str, Any], Corpus, Any, Any]:
    """The configuration, the text, the model and its tokenizer.

    Raises:
        UserError: one of them cannot be used.
    """
    config = load_config(arguments)
    try:
        corpus = load_corpus(arguments.data, labelled=arguments.task == "classification")
    except DataError as error:
        raise UserError(f"--data {arguments.data}: {error}") from error
    torch.manual_seed(arguments.seed)  # a new classification head is the same on all ranks
    model, tokenizer = load_model(arguments, corpus.num_classes)
    return config, corpus, model, tokenizer


def load_batches(
    arguments: argparse.Namespace, corpus: Corpus, tokenizer: Any, engine: Any, first_step: int
) -> tuple[list[Batch], Iterator[Batch]]:
    """This rank's held-out batches, and those to train on from a step on.

    Raises:
        UserError: there is too little text.
    """
    batch_size, world_size = engine.train_micro_batch_size_per_gpu(), dist.get_world_size()
    place = {"batch_size": batch_size, "rank": dist.get_rank(), "world_size": world_size}
    classify = arguments.task == "classification"
    make_examples = classification_examples if classify else language_modelling_examples
    try:
        examples = make_examples(
            corpus,
            tokenizer,
            arguments.sequence_length,
            num_held_out=arguments.evaluation_batches * batch_size * world_size,
            seed=arguments.seed,
        )
        held_out = []
        if arguments.evaluation_batches:
            order = batches(examples.held_out, examples.collate, seed=0, **place)
            held_out = [next(order) for _ in range(arguments.evaluation_batches)]
        data = batches(
            examples.training,
            examples.collate,
            seed=arguments.seed,
            first=first_step * engine.gradient_accumulation_steps(),
            **place,
        )
    except DataError as error:
        raise UserError(f"--data {arguments.data}: {error}") from error
    return held_out, data


def train(
    arguments: argparse.Namespace,
    engine: Any,
    data: Iterator[Batch],
    losses: list[float],
    checkpoints: Path,
) -> list[float]:
    """All steps that `losses` does not have yet, which it gets; the seconds of each."""
    seconds = []
    progress = tqdm(
        total=arguments.steps,
        initial=len(losses),
        desc="with spectral_ds" if spectral_ds.plugin_of(engine) else "fine-tuning",
        unit="step",
    )
    while len(losses) < arguments.steps:
        started = time.perf_counter()
        losses.append(train_step(engine, data, arguments.seed, step=len(losses)))
        get_accelerator().synchronize()
        seconds.append(time.perf_counter() - started)
        if engine.monitor.enabled:
            loss_event = ("Train/Samples/train_loss", losses[-1], engine.global_samples)
            engine.monitor.write_events([loss_event])
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        progress.update()
        if arguments.save_interval and len(losses) % arguments.save_interval == 0:
            engine.save_checkpoint(str(checkpoints), client_state={"losses": losses})
    progress.close()
    return seconds


def figures_of_plugin(plugin: Any) -> dict[str, float | None]:
    """What the summary has of a run with the plugin."""
    measured = plugin.metrics()
    return {
        "filter_seconds": measured.get("filter_seconds"),  # none before the first monitored step
        "boundary_bytes": measured.get("boundary_bytes"),
        "nodes": plugin.graph.num_nodes,
        "edges": plugin.graph.num_edges,
    }


def main() -> None:
    """Fine-tunes."""
    arguments = parse_arguments()
    # Collectives of inference alone, which would be compiled for a minute on a CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    if dist.get_rank() != 0:  # no progress bars, neither transformers' nor ours
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # type: ignore[method-assign, assignment]

    error: Exception | None = None
    try:
        config, corpus, model, tokenizer = load_inputs(arguments)
    except UserError as problem:
        error = problem
    end_together(error)

    # ---- what a DeepSpeed user changes: deepspeed.initialize becomes spectral_ds.initialize ----
    weight_decay = config.get("optimizer", {}).get("params", {}).get("weight_decay", 0.0)
    try:
        engine, _, _, _ = spectral_ds.initialize(
            model=model, model_parameters=parameter_groups(model, weight_decay), config=config
        )
    except (spectral_ds.SpectralConfigError, spectral_ds.UnsupportedEngineError) as problem:
        error = UserError(f"--deepspeed_config {arguments.deepspeed_config}: {problem}")
    end_together(error)
    # --------------------------------------------------------------------------------------------

    reference = Reference(engine)
    checkpoints = arguments.output / "checkpoints"
    losses: list[float] = []
    if arguments.resume is not None:
        losses = resume(engine, checkpoints if arguments.resume is True else arguments.resume)
    try:
        held_out, data = load_batches(arguments, corpus, tokenizer, engine, len(losses))
    except UserError as problem:
        error = problem
    end_together(error)

    evaluation_before = evaluate(engine, held_out)
    step_seconds = train(arguments, engine, data, losses, checkpoints)
    summary = {
        "final_loss": losses[-1],
        "losses": losses,
        "evaluation_loss_before": evaluation_before,
        "evaluation_loss": evaluate(engine, held_out),
        "perturbation": reference.perturbation(),
        "step_seconds": statistics.median(step_seconds) if step_seconds else None,
        "world_size": dist.get_world_size(),
        "zero_stage": engine.zero_optimization_stage(),
    }
    plugin = spectral_ds.plugin_of(engine)
    if plugin is not None:
        summary |= figures_of_plugin(plugin)
    if arguments.save_model:
        save_model(engine, tokenizer, arguments.output / "model")
    if dist.get_rank() == 0:
        target = arguments.summary or arguments.output / "summary.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
