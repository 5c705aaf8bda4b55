"""Compares fine-tuned models: what each has learned, against what it still knows.

In:  the model that all were made from; fine-tuned ones, as folders of finetune.py with `model` and
     `summary.json`, or of a model alone; text of the task, of which the examples that finetune.py
     holds out are taken, and text of another kind.
Out: a table on standard output, --output DIR with knowledge.json and knowledge.png. The line in the
     figure is plain interpolation between the weights before and after the first run.

To classify: accuracy and loss on the task; and of what it knew, the share of the 10 nearest
neighbours that texts of another kind have kept, by the mean of the last hidden states. For a causal
language model: loss on the task and on text of another kind.

    python launch/knowledge.py --base MODEL --task classification --data reviews.tsv \\
        --general editorials.tsv --run without=runs/a --run retain=runs/b --output runs
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from spectral_ds.cli.arguments import at_least
from spectral_ds.cli.errors import UserError
from spectral_ds.cli.examples import (
    Corpus,
    classification_examples,
    language_modelling_examples,
    load_corpus,
)
from spectral_ds.cli.knowledge import (
    NEIGHBOURS,
    Sequences,
    class_scores,
    loss_on,
    neighbours_of,
    share_kept,
)
from spectral_ds.cli.models import Source, load_tokenizer
from spectral_ds.console.figure_style import BLUE, COLORS, GREY, new_figure, styled
from spectral_ds.text import DataError, read_texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Shares of the change on the line of interpolation, besides 0 and 1.
INTERPOLATED = (0.25, 0.5, 0.75)


class Knowledge(NamedTuple):
    """What a model has learned, and what it still knows.

    Attributes:
        task_loss: on the task's held-out examples.
        accuracy: there; None if it does not classify.
        known: to classify: share of nearest neighbours kept; else the loss on other text.
        step_seconds: of an optimizer step in training; None if that is not known.
    """

    task_loss: float
    accuracy: float | None
    known: float
    step_seconds: float | None = None


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--base", required=True, help="the model before fine-tuning: folder, hub name or .gguf")
    add("--run", required=True, action="append", metavar="NAME=FOLDER", help="a fine-tuned model")
    add("--task", choices=["causal-lm", "classification"], default="causal-lm")
    add("--data", required=True, type=Path, help="text of the task, as finetune.py takes it")
    add("--general", required=True, type=Path, help="text of another kind")
    add("--held-out", type=at_least(1), default=512, help="examples of the task")
    add("--texts", type=at_least(2 * NEIGHBOURS), default=512, help="texts of the other kind")
    add("--sequence-length", type=at_least(2), default=128, help="tokens")
    add("--seed", type=int, default=0, help="of finetune.py")
    add("--output", type=Path, required=True, help="folder for the results")
    return parser.parse_args()


class Examination:
    """Examines models of one architecture.

    Args:
        task: held-out examples, as token ids.
        labels: their classes; None for a causal language model.
        general: other text, as token ids.
    """

    def __init__(self, task: Sequences, labels: Tensor | None, general: Sequences) -> None:
        self._task, self._labels, self._general = task, labels, general
        self._neighbours: Tensor | None = None

    def remember(self, model: Any) -> None:
        """Take what this model knows for what others should still know."""
        if self._labels is not None:
            self._neighbours = neighbours_of(model, self._general)

    def of(self, model: Any) -> Knowledge:
        """What a model knows."""
        if self._labels is None:
            return Knowledge(loss_on(model, self._task), None, loss_on(model, self._general))
        assert self._neighbours is not None, "remembered"
        scores = class_scores(model, self._task)
        right = (scores.argmax(1) == self._labels).double().mean()
        kept = share_kept(self._neighbours, neighbours_of(model, self._general))
        return Knowledge(float(cross_entropy(scores, self._labels)), float(right), kept)


@contextmanager
def moved_by(model: torch.nn.Module, start: dict[str, Tensor], share: float) -> Iterator[None]:
    """The model with its weights moved only a share of the way from some others."""
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    between = {
        name: torch.lerp(start[name], tensor, share)
        if name in start and tensor.is_floating_point()
        else tensor
        for name, tensor in own.items()
    }
    model.load_state_dict(between)
    yield
    model.load_state_dict(own)


def load(source: str, task: str, classes: int, tokenizer: Any) -> Any:
    """A model in float32 that knows what padding is."""
    kind: Any = transformers.AutoModelForCausalLM
    settings: dict[str, Any] = {}
    if task == "classification":
        kind = transformers.AutoModelForSequenceClassification
        settings = {"num_labels": classes}
    model = Source.of(source).load(kind, dtype=torch.float32, **settings)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def make_sequences(
    arguments: argparse.Namespace, corpus: Corpus, tokenizer: Any
) -> tuple[Sequences, Tensor | None, Sequences]:
    """The task's held-out examples, their classes if any, and other text."""
    cut = {"num_held_out": arguments.held_out, "seed": arguments.seed}
    length = arguments.sequence_length
    texts = read_texts(arguments.general)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    if arguments.task == "classification":
        held_out = classification_examples(corpus, tokenizer, length, **cut).held_out
        chosen = [texts[i] for i in order[: arguments.texts]]
        general = tokenizer(chosen, truncation=True, max_length=length)["input_ids"]
        return [ids for ids, _ in held_out], torch.tensor([y for _, y in held_out]), general
    held_out = language_modelling_examples(corpus, tokenizer, length, **cut).held_out
    other = Corpus([texts[i] for i in order], None, 0)
    found = language_modelling_examples(other, tokenizer, length, num_held_out=1, seed=0)
    return (
        [e.tolist() for e in held_out],
        None,
        [e.tolist() for e in found.training[: arguments.texts]],
    )


def examine(
    arguments: argparse.Namespace, runs: dict[str, str]
) -> tuple[dict[str, Knowledge], list[Knowledge]]:
    """What all models know, the first before fine-tuning; and those on the line to the first run.

    Raises:
        UserError: a model or text cannot be used.
    """
    classifies = arguments.task == "classification"
    try:
        corpus = load_corpus(arguments.data, labelled=classifies)
        tokenizer = load_tokenizer(Source.of(folder_of_model(next(iter(runs.values())))))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        task, labels, general = make_sequences(arguments, corpus, tokenizer)
    except DataError as error:
        raise UserError(f"{arguments.data} or {arguments.general}: {error}") from error
    torch.manual_seed(arguments.seed)
    base = load(arguments.base, arguments.task, corpus.num_classes, tokenizer)
    examination = Examination(task, labels, general)
    examination.remember(base)
    start = {n: t.clone() for n, t in base.state_dict().items() if not is_head(n, base)}
    found, line = {"before": examination.of(base)}, []
    with tqdm(total=len(runs) + len(INTERPOLATED), desc="examining", unit="model") as progress:
        for name, folder in runs.items():
            model = load(folder_of_model(folder), arguments.task, corpus.num_classes, tokenizer)
            found[name] = examination.of(model)._replace(step_seconds=step_seconds(folder))
            progress.update()
            if len(found) == 2:
                for share in INTERPOLATED:
                    with moved_by(model, start, share):
                        line.append(examination.of(model))
                    progress.update()
    return found, line


def folder_of_model(run: str) -> str:
    """Where the model of a run lies."""
    inside = Path(run) / "model"
    return str(inside) if inside.is_dir() else run


def step_seconds(run: str) -> float | None:
    """The median step of a run, from its summary."""
    summary = Path(run) / "summary.json"
    if not summary.is_file():
        return None
    seconds: float | None = json.loads(summary.read_text("utf-8"))["step_seconds"]
    return seconds


def is_head(name: str, model: Any) -> bool:
    """Whether a weight is of a new head, which has nothing to go back to."""
    prefix = f"{model.base_model_prefix}."
    classifies = "SequenceClassification" in type(model).__name__
    return classifies and not name.startswith(prefix)


def table(found: dict[str, Knowledge]) -> str:
    """A line a model."""
    classifies = any(each.accuracy is not None for each in found.values())
    known = "of what it knew, kept" if classifies else "loss on other text"
    head = ["", *(["accuracy"] if classifies else []), "loss on the task", known, "a step"]
    lines = [head]
    for name, each in found.items():
        share = f"{100 * each.known:.1f} %" if classifies else f"{each.known:.3f}"
        accuracy = [] if each.accuracy is None else [f"{100 * each.accuracy:.1f} %"]
        is_new = classifies and name == "before"  # its head has learned nothing yet
        cells = ["-"] * (len(accuracy) + 1) if is_new else [*accuracy, f"{each.task_loss:.3f}"]
        seconds = "-" if each.step_seconds is None else f"{each.step_seconds:.2f} s"
        lines.append([name, *cells, share, seconds])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = [
        "  ".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]).rstrip()
        for first, *cells in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


@styled
def draw(found: dict[str, Knowledge], line: Sequence[Knowledge]) -> Figure:
    """Task against knowledge; better is down and, to classify, right."""
    figure = new_figure(5.0)
    axes = figure.subplots()
    before, first, *_ = found.values()
    classifies = first.accuracy is not None
    on_line = [*line, first] if classifies else [before, *line, first]
    axes.plot(
        [each.known for each in on_line],
        [each.task_loss for each in on_line],
        color=GREY,
        marker=".",
        label="between the weights before and after",
    )
    for color, (name, each) in zip(COLORS, list(found.items())[1:], strict=False):
        axes.plot(each.known, each.task_loss, "o", color=color, markersize=9, label=name)
    axes.set_ylabel("loss on the task")
    axes.set_xlabel("share of what it knew, kept" if classifies else "loss on other text")
    axes.set_title("What is learned, and what is kept")
    if not classifies:
        axes.axvline(before.known, color=BLUE, linewidth=1, linestyle=":")
    axes.legend()
    return figure


def main() -> None:
    """Examines all models, prints the table and writes the results."""
    arguments = parse_arguments()
    runs = dict(each.partition("=")[::2] for each in arguments.run)
    try:
        found, line = examine(arguments, runs)
    except UserError as error:
        raise SystemExit(f"knowledge: {error}") from None
    print(table(found))
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = {
        "models": {name: each._asdict() for name, each in found.items()},
        "interpolated": [
            {"share": share, **each._asdict()}
            for share, each in zip(INTERPOLATED, line, strict=True)
        ],
    }
    target = arguments.output / "knowledge.json"
    target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw(found, line).savefig(arguments.output / "knowledge.png")


if __name__ == "__main__":
    main()
