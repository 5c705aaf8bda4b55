"""Gradients of a model on batches of tokens, and what is kept of them: means and statistics."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from spectral_ds.cli.inspect.batches import Batch
from spectral_ds.cli.inspect.model_under_test import ModelUnderTest
from spectral_ds.geometry.buckets import bucket_elements
from spectral_ds.graph import ParameterNodes
from spectral_ds.laplacian import ParameterGraph, plan_on_node_signals
from spectral_ds.sharding import Signal
from spectral_ds.sketches.node_sketches import Sketches
from spectral_ds.spectrum import GradientStatistics, Spectrometer

# Powers are sums over many nodes: fewer projections of each do than a comparison of two takes.
JUDGING_SKETCH_WIDTH = 32
# Nothing is forgotten: all samples weigh alike.
NO_DECAY = 1 - 1e-9


def gradients_of(model: ModelUnderTest, batches: Iterable[Batch]) -> Iterator[Signal]:
    """The gradient of the mean loss over each batch; valid until the next is asked for."""
    model.module.train()
    for batch in batches:
        model.module.zero_grad()
        model.module(**batch).loss.backward()
        yield model.gradients()
    model.module.zero_grad()


class MeanGradient:
    """The mean of a gradient's sketches: features for similarity of gradients.

    Args:
        parameters: the nodes that are sketched.
        sketch_width: of the projections, as the edge family has it.
    """

    def __init__(
        self, model: ModelUnderTest, parameters: Sequence[ParameterNodes], sketch_width: int
    ) -> None:
        self._sketches = Sketches(
            parameters, model.layout, sketch_width, model.seed, model.communicator
        )
        self._mean = self._sketches.empty()
        self._samples = 0

    def observe(self, gradients: Signal) -> None:
        """Take one sample."""
        self._samples += 1
        self._mean += (self._sketches.take(gradients) - self._mean) / self._samples

    def __call__(self, parameters: Sequence[ParameterNodes], sketch_width: int) -> torch.Tensor:
        """Features of all nodes of some parameters; (nodes, sketch), float64."""
        return self._sketches.features(self._mean, parameters)


def statistics_on(
    model: ModelUnderTest, graph: ParameterGraph, bands: int
) -> GradientStatistics | None:
    """Statistics of the gradient on the joined part of a graph; None if nothing is joined.

    Parameters without any edge are left out: all they have is λ = 0, so that they would count as
    smooth on every graph. The projections are not those by which similarity has chosen neighbours,
    in which these would look more alike than they are.
    """
    joined = [group for group in graph.groups if len(group.edges) > 0]
    if not joined:
        return None
    part, communicator = graph.of_groups(joined), model.communicator
    seed = (model.seed + 1) % 2**63
    sketches = Sketches(part.parameters, model.layout, JUDGING_SKETCH_WIDTH, seed, communicator)
    plan = plan_on_node_signals(
        part,
        sketches.columns,
        sketches.layout,
        communicator,
        communicator,
        bucket_elements=bucket_elements(communicator.device),
    )
    spectrometer = Spectrometer(sketches, plan, communicator)
    return GradientStatistics(sketches, spectrometer, bands=bands, decay=NO_DECAY)
