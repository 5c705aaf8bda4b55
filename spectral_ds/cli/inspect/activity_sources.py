"""Whose activations are looked at: random tokens, the text, and what a configuration names."""

from collections.abc import Sequence
from dataclasses import replace

from spectral_ds.cli.errors import UserError
from spectral_ds.cli.inspect.activity import DATA, RANDOM, RANK, ActivityMeasurement
from spectral_ds.cli.inspect.batches import Batch
from spectral_ds.cli.inspect.model_under_test import ModelUnderTest
from spectral_ds.coactivation import InputsError, calibrate, random_batches, user_batches
from spectral_ds.coactivation import file as statistics
from spectral_ds.config import GraphConfig
from spectral_ds.console.progress import progress
from spectral_ds.stack import GraphChoice, graphs_of

# Inputs that are not there before a training.
LATER = ("none", "training", "given")


def of_data(
    model: ModelUnderTest, settings: GraphConfig, batches: Sequence[Batch], seed: int
) -> list[ActivityMeasurement]:
    """Of random tokens and of some batches of the text, equally many.

    Args:
        settings: whose parameters are looked at.

    Raises:
        UserError: the model has no vocabulary.
    """
    chosen = GraphConfig("column", settings.include, settings.exclude)
    parameters, sites = model.with_inputs(model.nodes(chosen))
    count, length = batches[0]["input_ids"].shape
    try:
        random = random_batches(model.module, count * len(batches), length, seed)
    except InputsError as error:
        raise UserError(f"--data: {error}") from error
    found = []
    for name, inputs in {RANDOM: random, DATA: user_batches(batches)}.items():
        with progress(f"activations of {name}", len(inputs), "batch", True) as update:
            alone = model.communicator
            graphs = calibrate(model.module, sites, inputs, RANK, seed, alone, update)
        found.append(ActivityMeasurement(name, model, parameters, graphs))
    return found


def of_configuration(
    model: ModelUnderTest, choices: Sequence[GraphChoice], has_data: bool, seed: int
) -> list[ActivityMeasurement]:
    """Of what graphs of family activations keep and learn, where that is there.

    Args:
        has_data: whether random tokens are looked at already.

    Raises:
        SpectralConfigError: the model cannot be called with it, or a file cannot be used.
    """
    found = []
    for choice in choices:
        edge = choice.settings.edges[0]
        parameters, sites = model.with_inputs(choice.parameters)
        for what, source in {"keep": edge.keep, "learn": edge.learn}.items():
            if source in LATER or (source == "random" and has_data):
                continue
            key = f"spectral_ds.{choice.key}.edges[0].{what}"
            is_found = source.endswith(statistics.SUFFIX)  # there may be no more than is asked for
            more = edge if is_found else replace(edge, rank=max(edge.rank, RANK))
            graphs = graphs_of(source, key, more, sites, model.module, model.communicator, seed)
            name = f"{choice.key}, {what} {source}"
            found.append(ActivityMeasurement(name, model, parameters, graphs))
    return found
