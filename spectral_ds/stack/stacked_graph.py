"""One graph of the stack, with the operators, statistics and filter that act on it."""

import hashlib
import json
import logging
from collections.abc import Collection
from dataclasses import asdict

import torch

from spectral_ds.checkpoint import PartState, Restoration, SavedState
from spectral_ds.config import SpectralConfig
from spectral_ds.console.progress import progress
from spectral_ds.engines import Engine
from spectral_ds.filters import GraphFilter, GraphPenalty
from spectral_ds.geometry.buckets import below_shard, bucket_elements
from spectral_ds.graph import Edges
from spectral_ds.laplacian import (
    OperatorPlan,
    ParameterGraph,
    Work,
    plan_operators,
    require_one_graph,
)
from spectral_ds.sharding import ShardLayout, Signal
from spectral_ds.sketches import WeightFeatures, no_features
from spectral_ds.spectrum import (
    Density,
    Eigenpairs,
    SignalToNoise,
    Spectrometer,
    density_of_states,
    lowest_eigenpairs,
)
from spectral_ds.stack.choices import GraphChoice
from spectral_ds.stack.edgeless import edgeless
from spectral_ds.stack.responses import check_exchanges, choose_transfers, works_of
from spectral_ds.stack.samples import GradientSamples


class StackedGraph:
    """A graph of the stack, with all that acts on it. Made and rebuilt collectively.

    Args:
        index: which graph of the stack it is, from 0.
        choice: what the graph is made of.
        whole: all of the configuration.
        engine: whose gradients are filtered.
        layout: the fragments of all ranks.

    Attributes:
        graph: the graph in use.
        plan: how its neighbours are brought together.
        spectrometer: measures spectra of signals on it.
        samples: what is kept of the gradient for it.
        filter: (1 − s) + s · h(L).
        penalty: r(L) + ρI of the regularizer; None without one.
    """

    graph: ParameterGraph
    plan: OperatorPlan
    spectrometer: Spectrometer
    filter: GraphFilter
    penalty: GraphPenalty | None = None

    def __init__(
        self,
        index: int,
        choice: GraphChoice,
        whole: SpectralConfig,
        engine: Engine,
        layout: ShardLayout,
    ) -> None:
        self._index = index
        self.parameters = choice.parameters
        self._config, self._whole = choice.settings, whole
        self._engine, self._layout = engine, layout
        # Of several graphs, the first has the ridge.
        self._ridge = whole.regularizer.ridge if index == 0 else 0.0
        self._families = choice.families
        self._choice, self._is_told = choice, False
        self.samples = GradientSamples(index, choice, whole, engine, layout)
        self._is_in_use = False
        self.build()
        self._is_in_use = True

    def is_due(self, step: int) -> bool:
        """Whether the graph is to be rebuilt at this step."""
        every = self._config.refresh_interval
        return every > 0 and step > 0 and step % every == 0

    def build(self) -> None:
        """Build the graph from what the model and its gradients are now (collective).

        Raises:
            SpectralConfigError: the response cannot be evaluated on it.
            GraphsDifferError: ranks have made different graphs; on all ranks.
        """
        communicator, everyone = self._engine.communicator, self._engine.everyone
        gradient = self.samples.feature_source()
        with progress(
            "building the parameter graph", len(self.parameters), "parameter", everyone.rank == 0
        ) as update:
            self.graph = ParameterGraph.build(
                self.parameters,
                self._families,
                self._layout,
                {
                    "weights": WeightFeatures(
                        self._layout.own, self._engine.weights(), self._whole.seed, communicator
                    ),
                    "gradient": gradient,
                },
                communicator,
                normalized=self._config.laplacian == "normalized",
                progress=update,
            )
        self._use_graph(self.samples.features is None or gradient is not no_features)
        self._warn_if_edgeless()

    def _warn_if_edgeless(self) -> None:
        """Say once that a graph on which something acts joins nothing."""
        acts = self.penalty is not None or not self.filter.is_identity(1.0)
        if acts and self.filter.is_ready and not self._is_told:
            reason = edgeless(self.graph, self._families)
            self._is_told = bool(reason)
            if reason:
                self._warn(f"spectral_ds.{self._choice.key}: {reason}")

    @property
    def digest(self) -> str:
        """SHA-256 of the graph's configuration, hexadecimal."""
        settings = {**asdict(self._config), "seed": self._whole.seed}
        if self._choice.by_module:
            settings["by_module"] = self._choice.by_module
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def changed_inputs(self, saved: SavedState) -> str:
        """It is made of no files."""
        return ""

    def begin_step(self, step: int) -> None:
        """It waits for nothing."""

    def forget(self) -> None:
        """It hooks nothing."""

    def samples_at(self, step: int) -> bool:
        """Whether it samples the gradient at this step."""
        return self.samples.is_due(step)

    def sample(
        self, step: int, gradients: Signal, scale: float, is_finite: torch.Tensor | None
    ) -> None:
        """Sample the gradient where it is due; see `GradientSamples.take` (collective)."""
        self.samples.take(step, gradients, scale, is_finite)

    def take_over(self, other: object, names: Collection[str]) -> None:
        """Go on with what another has sampled of these parameters (collective)."""
        if isinstance(other, StackedGraph) and self.samples.take_over(other.samples, names):
            self.build()

    def state(self) -> PartState:
        """See `Part.state`."""
        is_ready = torch.tensor([float(self.filter.is_ready)], dtype=torch.float64, device="cpu")
        own = PartState(
            {f"graph.{self._index}.is_ready": is_ready}, edges=self.graph.primary_edges()
        )
        return own | self.samples.state()

    def restore(self, saved: SavedState) -> Restoration:
        """See `Part.restore`."""
        is_ready = saved.number(f"graph.{self._index}.is_ready") > 0
        restore_samples = self.samples.restore(saved)

        def put_in_place() -> None:
            restore_samples()
            self._go_on_with(saved.edges[self._index], is_ready)

        return put_in_place

    def whole_pieces(self) -> dict[str, dict[str, int]]:
        """See `GraphPart.whole_pieces`."""
        return self.samples.whole_pieces()

    def _go_on_with(self, edges: Edges, is_ready: bool) -> None:
        """Go on with the graph of a saved state, the statistics being restored (collective).

        Args:
            edges: all edges, as `ParameterGraph.primary_edges` numbers nodes.
            is_ready: whether the saved filter acted.
        """
        self.graph = ParameterGraph.of_edges(
            self.parameters,
            self._families,
            self._layout,
            edges,
            self._engine.communicator,
            normalized=self._config.laplacian == "normalized",
        )
        self._use_graph(is_ready, is_new=False)

    def _use_graph(self, is_ready: bool, is_new: bool = True) -> None:
        """Make everything that acts on the graph (collective).

        Args:
            is_ready: whether its edges are known yet.
            is_new: whether statistics are to forget what they measured on another graph.
        """
        communicator, everyone = self._engine.communicator, self._engine.everyone
        device = communicator.device
        require_one_graph(self.graph, communicator, everyone)
        spectrometer = self.samples.use_graph(self.graph, is_new)
        transfers = choose_transfers(
            self._whole,
            self.graph.lambda_max,
            self.graph.only_paths,
            device,
            self.samples.statistics,
            # A new graph has another spectrum: training must not end of it.
            self._warn if self._is_in_use else None,
        )
        self._works = works_of(transfers, self._whole)
        self.plan = plan_operators(
            self.graph,
            self._layout,
            communicator,
            everyone,
            work=self._works.total,
            exchange=self._whole.operator.exchange,
            kernel=self._whole.operator.kernel,
            exchange_dtype=getattr(torch, self._whole.operator.exchange_dtype),
            bucket_elements=below_shard(
                bucket_elements(device),
                sum(parameter.numel for parameter in self.parameters),
                communicator.world_size,
            ),
        )
        used = [way for way, count in self.plan.exchanges.items() if count]
        check_exchanges(self._works, used, self._whole)
        self.spectrometer = spectrometer or Spectrometer(None, self.plan, communicator)
        self.filter = GraphFilter(self.plan.shipments, transfers.filter, is_ready)
        if transfers.penalty is not None:
            self.penalty = GraphPenalty(self.plan.shipments, transfers.penalty, self._ridge)

    def _warn(self, message: str) -> None:
        self._engine.log(message, logging.WARNING)

    def most_edges(self) -> int:
        """The most directed edges that the edge families can make of these nodes."""
        nodes = sum(parameter.nodes for parameter in self.parameters)
        a_node = [2 * e.neighbours if e.family == "similarity" else 2 for e in self._config.edges]
        return nodes * sum(a_node)

    def bytes_sent(self, strength: float) -> int:
        """Bytes that all ranks together send in one step.

        Args:
            strength: of the filter in this step.
        """
        acts = not self.filter.is_identity(strength)
        return self.plan.bytes_of(self._works.penalty + (self._works.filter if acts else Work()))

    def describe(self) -> str:
        """What it is and how it filters, for people."""
        return (
            f"{self.graph.describe()}; {self.plan.describe()}; filter "
            f"{self._whole.filter.response} {self.filter.transfer.describe()}; scratch "
            f"{self.plan.scratch_bytes / 2**20:.1f} MiB on this rank"
        )

    def eigenpairs(self, k: int) -> list[Eigenpairs]:
        """The k lowest eigenpairs of every group of joined parameters (collective).

        Raises:
            NotConvergedError: the solver did not reach its residual; on all ranks.
        """
        is_shown = self._engine.everyone.rank == 0
        with progress("eigenpairs", len(self.graph.groups), "group", is_shown) as update:
            return lowest_eigenpairs(
                self.graph, k, self._engine.communicator, seed=self._whole.seed, progress=update
            )

    def density(self, bins: int) -> Density:
        """Share of the eigenvalues in each of equal bins of [0, λ_max] (collective)."""
        return density_of_states(self.graph, bins, self._engine.communicator, seed=self._whole.seed)

    def signal_to_noise(self) -> SignalToNoise:
        """Signal, noise and their ratio per band of frequency, from the samples so far.

        Raises:
            RuntimeError: nothing is sampled: the monitor is off and nothing else needs it.
        """
        if self.samples.statistics is None:
            raise RuntimeError(
                "signal and noise are not measured: set spectral_ds.monitor.enabled to true, and "
                "graph.node to row or column"
            )
        return self.samples.statistics.signal_to_noise()
