"""`spectral-ds inspect`: graph and spectrum of a model's parameters, and which graph is worth it.

Nothing is trained. With --data, signal and noise of the gradient are measured on candidate graphs.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spectral_ds.cli.arguments import add_command, at_least
from spectral_ds.cli.errors import UserError
from spectral_ds.config import SpectralConfig, load_config
from spectral_ds.text import DataError

if TYPE_CHECKING:
    from spectral_ds.cli.inspect.batches import Batch
    from spectral_ds.cli.inspect.report import InspectReport
    from spectral_ds.cli.models import Source

# Gradients: both halves must be able to tell a mean from its noise.
FEWEST_STEPS = 4
EXAMPLES = """examples:
  spectral-ds inspect HuggingFaceTB/SmolLM2-135M
  spectral-ds inspect ./model --config spectral.yaml --out runs/inspect
  spectral-ds inspect model.gguf --data reviews.tsv --steps 32 --batch-size 8 --json
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(
        commands,
        "inspect",
        run,
        summary="graph and spectrum of a model's parameters; with --data, which graph to use",
        description="Builds the parameter graph of a configuration and measures it, without\n"
        "training. With --data, also measures which graph separates signal from noise in the\n"
        "gradient, says what to put into the configuration, and tells how much of the gradient\n"
        "goes along the directions that the inputs of layers use most.",
        examples=EXAMPLES,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, name on the hub, or .gguf file")
    add("--config", metavar="FILE", help='YAML, or DeepSpeed JSON with the section "spectral_ds"')
    add("--data", type=Path, metavar="FILE", help="TSV, JSONL, plain text or datasets folder")
    add("--text-column", metavar="NAME", help="of TSV, JSONL and datasets (default: text)")
    add("--out", type=Path, metavar="DIR", help="for summary.json and figures (default: none)")
    add("--json", action="store_true", help="print the summary as JSON, and nothing else")
    number: dict[str, Any] = {"type": at_least(1), "metavar": "N"}
    add("--steps", metavar="N", type=at_least(FEWEST_STEPS), default=32,
        help="gradients: half to make graphs, half to judge (default: 32)")  # fmt: skip
    add("--batch-size", default=4, help="sequences a gradient (default: 4)", **number)
    add("--sequence-length", metavar="N", type=at_least(2), default=128,
        help="tokens (default: 128)")  # fmt: skip
    add("--eigenvalues", default=8, help="how many of the lowest (default: 8)", **number)
    add("--threads", help="of the CPU (default: torch's own choice)", **number)


def run(arguments: argparse.Namespace) -> int:
    """Inspect a model.

    Raises:
        UserError: an argument cannot be used.
        SpectralConfigError: the configuration cannot.
    """
    from spectral_ds.cli.inspect.activity import said_of_activity
    from spectral_ds.cli.inspect.candidates import recommend
    from spectral_ds.cli.inspect.inspection import Inspection
    from spectral_ds.cli.inspect.model_under_test import ModelUnderTest
    from spectral_ds.cli.inspect.report import InspectReport
    from spectral_ds.cli.models import Source, load_model

    started = time.perf_counter()
    has_data = arguments.data is not None
    config = _usable_config(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    source = Source.of(arguments.model)
    module, is_causal = load_model(source, trains=has_data)
    model = ModelUnderTest(module, config.seed)
    inspection = Inspection(model, config, arguments.eigenvalues)
    batches: list[Batch] = []
    if has_data:
        batches = _batches(arguments, source, module, is_causal, config.seed)
        inspection.take_means(batches)
    inspection.look_at_activations(batches)
    graphs = inspection.graphs()
    results = inspection.candidate_results() if has_data else None
    activities = inspection.activities()
    candidates = {candidate.name: candidate.graph for candidate in inspection.candidates}
    report = InspectReport(
        model=arguments.model,
        parameters=len(model.trainable),
        elements=sum(parameter.numel() for parameter in model.trainable.values()),
        config=asdict(config),
        graphs=graphs,
        candidates=results,
        recommendation=None if results is None else recommend(results, candidates),
        activity=activities,
        activity_words=said_of_activity(activities),
        seconds=time.perf_counter() - started,
    )
    _deliver(report, arguments)
    return 0


def _usable_config(arguments: argparse.Namespace) -> SpectralConfig:
    """The configuration, once nothing that takes no time to see speaks against it."""
    has_data = arguments.data is not None
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out {arguments.out}: is not a folder")
    if has_data and not arguments.data.exists():
        raise UserError(f"--data {arguments.data}: no such file or folder")
    config = load_config({} if arguments.config is None else arguments.config)
    edges = [edge for graph in config.stack for edge in graph.edges]
    if not has_data and any(edge.features == "gradient" for edge in edges):
        raise UserError("the configuration joins nodes of similar gradients: give --data")
    return config


def _batches(
    arguments: argparse.Namespace, source: "Source", module: Any, is_causal: bool, seed: int
) -> "list[Batch]":
    """Batches of the text that --data names, as the model takes them."""
    from spectral_ds.cli.inspect.batches import causal, masked, token_batches
    from spectral_ds.cli.models import load_tokenizer, refuse_longer
    from spectral_ds.text import read_texts

    refuse_longer(arguments.sequence_length, module)
    tokenizer = load_tokenizer(source)
    try:
        tokens = token_batches(
            read_texts(arguments.data, arguments.text_column),
            tokenizer,
            batches=arguments.steps,
            batch_size=arguments.batch_size,
            sequence_length=arguments.sequence_length,
            seed=seed,
        )
    except DataError as error:
        raise UserError(f"{arguments.data}: {error}") from error
    return causal(tokens) if is_causal else masked(tokens, tokenizer, seed)


def _deliver(report: "InspectReport", arguments: argparse.Namespace) -> None:
    """Write, draw and print."""
    content = json.dumps(report.plain(), indent=2, allow_nan=False, ensure_ascii=False)
    written = []
    if arguments.out is not None:
        from spectral_ds.cli.inspect.plots import draw

        target = arguments.out / "summary.json"
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
            target.write_text(content + "\n", encoding="utf-8")
            written = [target, *draw(report, arguments.out)]
        except OSError as error:
            raise UserError(f"--out {arguments.out}: {error.strerror or error}") from error
    if arguments.json:
        sys.stdout.write(content + "\n")
    else:
        from spectral_ds.cli.inspect.tables import show

        show(report, written)
