"""Where the graphs of co-activation come from: what an edge of family `activations` asks for.

In: the settings of an edge, and an engine. Out: the graphs of the inputs to keep, or to learn.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectral_ds.coactivation import (
    Batch,
    Coactivation,
    InputsError,
    Site,
    calibrate,
    generated_batches,
    random_batches,
    sites_of,
    text_batches,
)
from spectral_ds.coactivation import file as statistics
from spectral_ds.config import EdgeConfig, SpectralConfigError
from spectral_ds.console.progress import progress
from spectral_ds.engines import Engine
from spectral_ds.graph import ParameterNodes
from spectral_ds.sharding import Communicator
from spectral_ds.stack.modules import facts_of, modules_of
from spectral_ds.text import DataError, read_learnable


def sites_of_graph(engine: Engine, parameters: Iterable[ParameterNodes]) -> list[Site]:
    """Where the parameters of a graph multiply activations."""
    return sites_among(engine.holders, engine.named, parameters)


def sites_among(
    holders: Iterable[object],
    named: Mapping[str, torch.Tensor],
    parameters: Iterable[ParameterNodes],
) -> list[Site]:
    """`sites_of_graph`, of a model that no engine trains.

    Args:
        holders: modules, and whatever else may hold some.
        named: parameters by name, at least these.
        parameters: whose nodes are columns.
    """
    shapes = {p.name: (p.matrices, p.width, p.nodes_of_matrix) for p in parameters}
    asked = {name: named[name] for name in shapes}
    return sites_of(modules_of(holders), asked, shapes)


def graphs_of(
    source: str,
    key: str,
    edge: EdgeConfig,
    sites: Sequence[Site],
    model: nn.Module,
    everyone: Communicator,
    seed: int,
) -> Coactivation:
    """The graphs of some inputs (collective).

    Args:
        source: random, generated, or the name of a file of texts or of statistics.
        key: where it stands in the configuration.
        edge: how much of it to look at.
        sites: whose graphs are wanted.
        model: the module itself, not compiled.
        everyone: the ranks that train it together.
        seed: of inputs and sketches.

    Raises:
        SpectralConfigError: the model cannot be called with it, or the file cannot be used; on all
            ranks.
    """
    found: Coactivation | None = None
    batches: list[Batch] = []
    with everyone.all_or_none():
        try:
            if source.endswith(statistics.SUFFIX):
                found = statistics.load(Path(source), edge.rank)
                _require_all(found, sites)
                found = found.among(site.parameter for site in sites)
            else:
                batches = _batches(source, edge, model, seed, _with_head(model, sites))
        except (InputsError, DataError) as error:
            raise SpectralConfigError(f'{key} = "{source}": {error}') from error
    if found is not None:
        return found
    shown = everyone.rank == 0
    with progress(f"looking at activations ({source})", len(batches), "call", shown) as update:
        try:
            return calibrate(model, sites, batches, edge.rank, seed, everyone, update)
        except Exception as error:  # there is no end to what a model raises; on all ranks
            raise SpectralConfigError(
                f'{key} = "{source}": {type(model).__name__} cannot be called with it '
                f"({type(error).__name__}: {error}); call it yourself: keep: given, and "
                "plugin.calibrate(batches)"
            ) from error


def _require_all(graphs: Coactivation, sites: Sequence[Site]) -> None:
    """Refuse statistics of another model."""
    for site in sites:
        spectra = graphs.of(site.parameter)
        inputs = {each.inputs for each in spectra if each is not None}
        if len(spectra) != site.matrices or inputs - {site.inputs}:
            raise InputsError(
                f"it has {len(spectra)} graphs of {sorted(inputs)} inputs for parameter "
                f"{site.parameter!r}, which has {site.matrices} of {site.inputs}"
            )


def _with_head(model: nn.Module, sites: Iterable[Site]) -> bool:
    """Whether one of the sites is the head of the model."""
    named = {site.parameter: getattr(site.module, site.attribute) for site in sites}
    return bool(facts_of([model], named).heads)


def _batches(
    source: str, edge: EdgeConfig, model: nn.Module, seed: int, with_head: bool
) -> list[Batch]:
    if source == "random":
        return random_batches(model, edge.samples, edge.length, seed, with_head)
    if source == "generated":
        return generated_batches(model, edge.samples, edge.length, seed)
    texts = read_learnable(Path(source))
    tokenizer = _tokenizer(edge.tokenizer or _name_of(model))
    return text_batches(model, texts, tokenizer, edge.samples, edge.length, seed, with_head)


def _name_of(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or ""
    if not name:
        raise InputsError(
            "the model does not say where its tokenizer is; name its folder in `tokenizer`"
        )
    return str(name)


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputsError(f"no tokenizer in {name!r}: {error}") from error
