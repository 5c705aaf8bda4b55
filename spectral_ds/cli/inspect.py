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

from spectral_ds.cli.errors import UserError
from spectral_ds.config import load_config

if TYPE_CHECKING:
    from spectral_ds.cli.models import Source
    from spectral_ds.cli.summary import Summary
    from spectral_ds.cli.text import Batch

# Gradients: both halves must be able to tell a mean from its noise.
FEWEST_STEPS = 4
EXAMPLES = """examples:
  spectral-ds inspect HuggingFaceTB/SmolLM2-135M
  spectral-ds inspect ./model --config spectral.yaml --out runs/inspect
  spectral-ds inspect model.gguf --data reviews.tsv --steps 32 --batch-size 8 --json
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "inspect",
        help="graph and spectrum of a model's parameters; with --data, which graph to use",
        description="Builds the parameter graph of a configuration and measures it, without\n"
        "training. With --data, also measures which graph separates signal from noise in the\n"
        "gradient, and says what to put into the configuration.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, name on the hub, or .gguf file")
    add("--config", metavar="FILE", help='YAML, or DeepSpeed JSON with the section "spectral_ds"')
    add("--data", type=Path, metavar="FILE", help="TSV, JSONL, plain text or datasets folder")
    add("--text-column", metavar="NAME", help="of TSV, JSONL and datasets (default: text)")
    add("--out", type=Path, metavar="DIR", help="for summary.json and figures (default: none)")
    add("--json", action="store_true", help="print the summary as JSON, and nothing else")
    number = {"type": _at_least(1), "metavar": "N"}
    add("--steps", metavar="N", type=_at_least(FEWEST_STEPS), default=32,
        help="gradients: half to make graphs, half to judge (default: 32)")  # fmt: skip
    add("--batch-size", default=4, help="sequences a gradient (default: 4)", **number)
    add("--sequence-length", default=128, help="tokens (default: 128)", **number)
    add("--eigenvalues", default=8, help="how many of the lowest (default: 8)", **number)
    add("--threads", help="of the CPU (default: torch's own choice)", **number)
    parser.set_defaults(run=run)


def _at_least(least: int) -> Any:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return number


def run(arguments: argparse.Namespace) -> int:
    """Inspect a model.

    Raises:
        UserError: an argument cannot be used.
        SpectralConfigError: the configuration cannot.
    """
    from spectral_ds.cli.candidates import recommend
    from spectral_ds.cli.findings import Findings
    from spectral_ds.cli.models import Source, load_model
    from spectral_ds.cli.subject import Subject
    from spectral_ds.cli.summary import Summary

    started = time.perf_counter()
    has_data = arguments.data is not None
    if arguments.out is not None and arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out {arguments.out}: is not a folder")
    if has_data and not arguments.data.exists():
        raise UserError(f"--data {arguments.data}: no such file or folder")
    config = load_config({} if arguments.config is None else arguments.config)
    edges = [edge for graph in config.stack for edge in graph.edges]
    if not has_data and any(edge.features == "gradient" for edge in edges):
        raise UserError("the configuration joins nodes of similar gradients: give --data")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    source = Source.of(arguments.model)
    model, is_causal = load_model(source, trains=has_data)
    subject = Subject(model, config.seed)
    findings = Findings(subject, config, arguments.eigenvalues)
    if has_data:
        findings.take_means(_batches(arguments, source, model, is_causal, config.seed))
    graphs = findings.graphs()
    verdicts = findings.verdicts() if has_data else None
    names = {candidate.name: candidate.graph for candidate in findings.candidates}
    summary = Summary(
        model=arguments.model,
        parameters=len(subject.trainable),
        elements=sum(parameter.numel() for parameter in subject.trainable.values()),
        config=asdict(config),
        graphs=graphs,
        candidates=verdicts,
        recommendation=None if verdicts is None else recommend(verdicts, names),
        seconds=time.perf_counter() - started,
    )
    _deliver(summary, arguments)
    return 0


def _batches(
    arguments: argparse.Namespace, source: "Source", model: Any, is_causal: bool, seed: int
) -> "list[Batch]":
    from spectral_ds.cli.models import load_tokenizer
    from spectral_ds.cli.text import causal, masked, token_batches

    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and arguments.sequence_length > longest:
        raise UserError(
            f"--sequence-length {arguments.sequence_length}: the model's longest is {longest}"
        )
    tokenizer = load_tokenizer(source)
    tokens = token_batches(
        arguments.data,
        arguments.text_column,
        tokenizer,
        batches=arguments.steps,
        batch_size=arguments.batch_size,
        sequence_length=arguments.sequence_length,
        seed=seed,
    )
    return causal(tokens) if is_causal else masked(tokens, tokenizer, seed)


def _deliver(summary: "Summary", arguments: argparse.Namespace) -> None:
    """Write, draw and print."""
    content = json.dumps(summary.plain(), indent=2, allow_nan=False, ensure_ascii=False)
    written = []
    if arguments.out is not None:
        from spectral_ds.cli.plots import draw

        target = arguments.out / "summary.json"
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
            target.write_text(content + "\n", encoding="utf-8")
            written = [target, *draw(summary, arguments.out)]
        except OSError as error:
            raise UserError(f"--out {arguments.out}: {error.strerror or error}") from error
    if arguments.json:
        sys.stdout.write(content + "\n")
    else:
        from spectral_ds.cli.report import show

        show(summary, written)
