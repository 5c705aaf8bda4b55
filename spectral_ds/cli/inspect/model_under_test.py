"""The model that is looked at: its parameters as one process holds them whole, and their graphs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from spectral_ds.cli.errors import UserError
from spectral_ds.coactivation import Site
from spectral_ds.config import GraphConfig, SpectralConfig
from spectral_ds.graph import ParameterNodes
from spectral_ds.laplacian import ParameterGraph
from spectral_ds.sharding import Communicator, Fragment, ShardLayout
from spectral_ds.sketches import FeatureSource, WeightFeatures, no_features
from spectral_ds.stack import (
    GraphChoice,
    ModelFacts,
    choose_graphs,
    choose_parameters,
    edge_families,
    facts_of,
    sites_among,
)

# Edges are kept as 24 bytes each: beyond so many nodes a graph does not fit into usual memory.
MAX_NODES = 2**24


@dataclass(frozen=True)
class ModelUnderTest:
    """A model without an engine.

    Args:
        module: float32, on the CPU.
        seed: of the random projections.
    """

    module: torch.nn.Module
    seed: int

    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    @property
    def communicator(self) -> Communicator:
        return Communicator.alone(torch.device("cpu"))

    @property
    def layout(self) -> ShardLayout:
        """One fragment a parameter, all of this process."""
        own = [Fragment(name, 0, p.numel()) for name, p in self.trainable.items()]
        return ShardLayout((tuple(own),), 0)

    def weights(self) -> list[torch.Tensor]:
        """Flat, in the order of the layout."""
        return [p.detach().reshape(-1) for p in self.trainable.values()]

    def gradients(self) -> list[torch.Tensor | None]:
        """Flat, in the order of the layout; None for a parameter without a gradient."""
        gradients = [p.grad for p in self.trainable.values()]
        return [None if gradient is None else gradient.reshape(-1) for gradient in gradients]

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.trainable.items()}

    @cached_property
    def facts(self) -> ModelFacts:
        """What the model's modules tell of its parameters."""
        return facts_of([self.module], self.trainable)

    def graphs(self, config: SpectralConfig) -> list[GraphChoice]:
        """The graphs of a configuration, once it is clear that they can be built.

        Raises:
            SpectralConfigError: one cannot; see `choose_graphs`.
            UserError: one has too many nodes to look at.
        """
        choices = choose_graphs(self._shapes, config, self.facts)
        for choice in choices:
            if not choice.is_coactivation:  # which stores no edges
                _refuse_too_many(choice.parameters, choice.key)
        return choices

    def nodes(self, config: GraphConfig) -> list[ParameterNodes]:
        """The nodes of the parameters that a graph covers.

        Raises:
            SpectralConfigError: its patterns choose none, or one matches nothing.
            UserError: they are too many to look at.
        """
        chosen, _ = choose_parameters(self._shapes, config, "graph", self.facts)
        _refuse_too_many(chosen, "graph")
        return chosen

    def with_inputs(
        self, parameters: Sequence[ParameterNodes]
    ) -> tuple[list[ParameterNodes], list[Site]]:
        """Those of some parameters whose inputs can be seen, and where.

        Args:
            parameters: whose nodes are columns.
        """
        sites = sites_among([self.module], self.trainable, parameters)
        names = {site.parameter for site in sites}
        return [parameter for parameter in parameters if parameter.name in names], sites

    def build(
        self,
        config: GraphConfig,
        parameters: Sequence[ParameterNodes],
        progress: Callable[[int], object],
        gradient: FeatureSource = no_features,
    ) -> ParameterGraph:
        """The graph of a configuration.

        Args:
            gradient: the features by which similarity of gradients compares.

        Raises:
            UnknownHeadWidthError: family pair meets grouped queries and does not know their heads.
        """
        communicator, layout = self.communicator, self.layout
        weights = WeightFeatures(layout.own, self.weights(), self.seed, communicator)
        return ParameterGraph.build(
            parameters,
            edge_families(config, self.facts.head_width),
            layout,
            {"weights": weights, "gradient": gradient},
            communicator,
            normalized=config.laplacian == "normalized",
            progress=progress,
        )


def _refuse_too_many(parameters: Sequence[ParameterNodes], key: str) -> None:
    count = sum(parameter.nodes for parameter in parameters)
    if count > MAX_NODES:
        raise UserError(
            f"spectral_ds.{key}: {count:,} nodes are more than the {MAX_NODES:,} that inspect "
            "looks at; include fewer parameters, or take rows for nodes"
        )
