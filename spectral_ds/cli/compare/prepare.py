"""Preparing: the folder of the model that all runs start from, and files of statistics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from spectral_ds.cli.compare.settings import (
    STATISTICS,
    Comparison,
    StatisticsConfig,
    chosen,
    words_of,
)
from spectral_ds.cli.errors import UserError
from spectral_ds.cli.merge.looking import Amount, batches_of, look
from spectral_ds.cli.models import Source, load_tokenizer, plain_folder
from spectral_ds.coactivation import Coactivation, InputsError
from spectral_ds.coactivation import file as statistics
from spectral_ds.coactivation.spectrum import Spectrum, spectrum_of

SHUFFLING_SEED = 0


@dataclass(frozen=True)
class Prepared:
    """What runs need besides texts.

    Attributes:
        base: folder of the model before training, with its tokenizer.
        kind: classification or causal-lm.
        files: statistics by name.
    """

    base: Path
    kind: str
    files: Mapping[str, Path]

    def tokenizer(self) -> Any:
        """The model's, which can pad."""
        tokenizer = load_tokenizer(Source.of(str(self.base)))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load(self, num_classes: int, folder: Path | None = None) -> Any:
        """The model in float32, with the head of its kind.

        Args:
            num_classes: of a classifier.
            folder: of another than the base model.
        """
        import transformers

        kind: Any = transformers.AutoModelForCausalLM
        settings: dict[str, Any] = {"dtype": torch.float32}
        if self.kind == "classification":
            kind, settings["num_labels"] = (
                transformers.AutoModelForSequenceClassification,
                num_classes,
            )
        model = Source.of(str(folder or self.base)).load(kind, **settings)
        model.config.pad_token_id = self.tokenizer().pad_token_id
        return model

    def file(self, word: str) -> str:
        """The path of statistics that a word names; any other word itself.

        Raises:
            UserError: there are none of this name.
        """
        if not word.startswith(STATISTICS):
            return word
        name = word.removeprefix(STATISTICS)
        if name not in self.files:
            raise UserError(f"{word}: there is none among {', '.join(self.files) or 'nothing'}")
        return str(self.files[name])

    def with_files(self, tree: Any) -> Any:
        """A tree of mappings and lists with all such words replaced."""
        if isinstance(tree, Mapping):
            return {key: self.with_files(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [self.with_files(value) for value in tree]
        return self.file(tree) if isinstance(tree, str) else tree


def prepare(comparison: Comparison, out: Path, num_classes: int) -> Prepared:
    """Make what is missing in a folder.

    Raises:
        UserError: the model cannot be loaded, a kind of inputs not be used with it, or statistics
            that are there not be read.
    """
    base = plain_folder(Source.of(comparison.model), out / "base")
    wanted = {word for each in chosen(comparison).values() for word in words_of(each)}
    every = {name: out / "statistics" / f"{name}.safetensors" for name in comparison.statistics}
    files = {name: path for name, path in every.items() if STATISTICS + name in wanted}
    prepared = Prepared(base, comparison.kind, files)
    see = cache(partial(_seen, cache(partial(prepared.load, num_classes)), prepared))
    for name, path in files.items():
        if path.exists():
            continue
        config = comparison.statistics[name]
        unchanged = replace(config, change="none")
        there = (
            other
            for one, other in every.items()
            if comparison.statistics[one] == unchanged and other.exists()
        )
        whole = next(there, None)
        graphs = see(unchanged) if whole is None else _loaded(whole, config.rank)
        statistics.save(path, changed(graphs, config.change), name, config.rank)
    return prepared


def _loaded(path: Path, rank: int) -> Coactivation:
    try:
        return statistics.load(path, rank)
    except InputsError as error:
        raise UserError(f"{path}: {error}; delete it to have it made again") from error


def _seen(
    load: Callable[[], nn.Module], prepared: Prepared, config: StatisticsConfig
) -> Coactivation:
    amount = Amount(config.samples, config.length, config.rank)
    model = load()
    batches = batches_of(config.keep, "statistics: keep =", model, amount, prepared.tokenizer, None)
    return look(model, batches, amount, f"keep {config.keep}")


def changed(graphs: Coactivation, change: str) -> Coactivation:
    """The same graphs, or controls that lack what is claimed to matter.

    Args:
        change: none; shuffled: eigenvectors are those of other nodes, eigenvalues stay; diagonal:
            how active each node is by itself, and no edge.
    """
    if change == "none":
        return graphs
    generator = np.random.default_rng(SHUFFLING_SEED)

    def of(spectrum: Spectrum | None) -> Spectrum | None:
        if spectrum is None:
            return None
        if change == "shuffled":
            order = generator.permutation(spectrum.inputs)
            return spectrum_of(spectrum.values, spectrum.vectors[order])
        diagonal = np.diag(spectrum.matrix())
        order = np.argsort(-diagonal, kind="stable")[: len(spectrum.values)]
        vectors = np.eye(spectrum.inputs, dtype=np.float32)[:, order]
        return spectrum_of(diagonal[order], vectors)

    return Coactivation(
        graphs.leaders, {n: [of(each) for each in own] for n, own in graphs.spectra.items()}
    )
