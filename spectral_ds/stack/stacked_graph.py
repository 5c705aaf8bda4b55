"""One graph of the stack, with the operators, statistics and filter that act on it."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from numbers import Integral

import torch

from spectral_ds.checkpoint import PartState, Restoration, SavedState
from spectral_ds.config import SpectralConfig
from spectral_ds.console.progress import progress
from spectral_ds.engines import Engine
from spectral_ds.filters import GraphFilter, GraphFunction, GraphPenalty
from spectral_ds.geometry.buckets import below_shard, bucket_elements, parameters_with_edges
from spectral_ds.graph import Edges, ParameterNodes
from spectral_ds.laplacian import (
    FeatureSource,
    OperatorPlan,
    ParameterGraph,
    WeightFeatures,
    Work,
    Workspace,
    plan_operators,
)
from spectral_ds.sharding import ShardLayout
from spectral_ds.sketches.features import no_features
from spectral_ds.sketches.node_sketches import Sketches
from spectral_ds.spectrum import (
    Density,
    Eigenpairs,
    GradientStatistics,
    RunningSketch,
    SignalToNoise,
    Spectrometer,
    density_of_states,
    lowest_eigenpairs,
)
from spectral_ds.stack.choices import GraphChoice, feature_width, is_adaptive, sketch_shape
from spectral_ds.stack.responses import check_exchanges, choose_transfers, works_of


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
        statistics: running means of the gradient on it; None if nobody needs them.
        features: running mean of the gradient that similarity compares; None if none does.
        filter: (1 − s) + s · h(L).
        penalty: r(L) + ρI of the regularizer; None without one.
    """

    graph: ParameterGraph
    plan: OperatorPlan
    workspace: Workspace
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
        self.statistics: GradientStatistics | None = None
        self._config, self._whole = choice.settings, whole
        self._engine, self._layout = engine, layout
        # Of several graphs, the first has the ridge.
        self._ridge = whole.regularizer.ridge if index == 0 else 0.0
        self._families = choice.families
        width, shape = feature_width(self._config), sketch_shape(self._config, whole)
        self.features: RunningSketch | None = None
        seed = whole.seed
        if width is not None:
            self.features = RunningSketch(self._make_sketches(width, 0, seed), self._decay)
            # In the projection that has chosen them, neighbours look more alike than they are.
            seed = (seed + 1) % 2**63
        self._sketches = None if shape is None else self._make_sketches(shape[0], shape[1], seed)
        self._is_in_use = False
        self.build()
        self._is_in_use = True

    @property
    def _decay(self) -> float:
        return self._whole.statistics.decay

    def _make_sketches(self, width: int, longest_whole: int, seed: int) -> Sketches:
        return Sketches(
            parameters_with_edges(self.parameters, self._families) or self.parameters,
            self._layout,
            width,
            seed,
            self._engine.communicator,
            longest_whole=longest_whole,
        )

    def is_due(self, step: int) -> bool:
        """Whether the graph is to be rebuilt at this step."""
        every = self._config.refresh_interval
        return every > 0 and step > 0 and step % every == 0

    def build(self) -> None:
        """Build the graph from what the model and its gradients are now (collective).

        Raises:
            SpectralConfigError: the response cannot be evaluated on it.
        """
        communicator, everyone = self._engine.communicator, self._engine.everyone
        gradient = self._gradient_features()
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
        self._use_graph(self.features is None or gradient is not no_features)

    @property
    def digest(self) -> str:
        """SHA-256 of the graph's configuration, hexadecimal."""
        settings = {**asdict(self._config), "seed": self._whole.seed}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @property
    def _running(self) -> dict[str, RunningSketch]:
        """The running means of sketches, by the names of their states."""
        found = {}
        if self.statistics is not None:
            found[f"sketch.{self._index}"] = self.statistics.running
        if self.features is not None:
            found[f"features.{self._index}"] = self.features
        return found

    def state(self) -> PartState:
        """See `Part.state`."""
        is_ready = torch.tensor([float(self.filter.is_ready)], dtype=torch.float64)
        state = PartState(
            {f"graph.{self._index}.is_ready": is_ready}, edges=self.graph.primary_edges()
        )
        if self.statistics is not None:
            state |= self.statistics.state(f"statistics.{self._index}")
        for name, running in self._running.items():
            state |= running.state(name)
        return state

    def restore(self, saved: SavedState) -> Restoration:
        """See `Part.restore`; running means of other sketches are left out."""
        is_ready = saved.number(f"graph.{self._index}.is_ready") > 0
        restorations = []
        for name, running in self._running.items():
            found = running.restore(name, saved)
            if found is not None:
                restorations.append(found)
                if self.statistics is not None and running is self.statistics.running:
                    state = f"statistics.{self._index}"
                    restorations.append(self.statistics.restore(state, saved))

        def put_in_place() -> None:
            for restoration in restorations:
                restoration()
            self._go_on_with(saved.edges[self._index], is_ready)

        return put_in_place

    def whole_pieces(self) -> dict[str, dict[str, int]]:
        """See `GraphPart.whole_pieces`: complete sketches."""
        return {
            name: {
                parameter.name: parameter.nodes * running.sketches.columns[parameter.name]
                for parameter in self.parameters
                if parameter.name in running.sketches.columns
            }
            for name, running in self._running.items()
        }

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
        self._build_statistics(is_new)
        transfers = choose_transfers(
            self._whole,
            self.graph.lambda_max,
            self.graph.only_paths,
            device,
            self.statistics,
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
            bucket_elements=below_shard(
                bucket_elements(device),
                sum(parameter.numel for parameter in self.parameters),
                communicator.world_size,
            ),
        )
        used = [way for way, count in self.plan.exchanges.items() if count]
        check_exchanges(self._works, used, self._whole)
        self.workspace = Workspace(self.plan.operators, device)
        if self._sketches is None:
            self.spectrometer = Spectrometer(
                None, self.plan.operators, self.workspace, communicator
            )
        self.filter = GraphFilter(self.plan.operators, self.workspace, transfers.filter, is_ready)
        if transfers.penalty is not None:
            function = GraphFunction(self.plan.operators, transfers.penalty)
            self.penalty = GraphPenalty(function, self.workspace, self._ridge)

    def _gradient_features(self) -> FeatureSource:
        running = self.features
        if running is None or not running.kept:  # samples that are not finite tell nothing
            return no_features

        def features(parameters: Sequence[ParameterNodes], sketch_width: int) -> torch.Tensor:
            return running.sketches.features(running.mean, parameters)

        return features

    def _build_statistics(self, is_new: bool) -> None:
        sketches = self._sketches
        if sketches is None:
            return
        communicator, groups = self._engine.communicator, self.graph.groups
        measured = [group for group in groups if group.parameters[0].name in sketches.columns]
        part = self.graph.of_groups(measured)
        signals = part.of_node_signals(sketches.columns, sketches.layout)
        plan = plan_operators(
            signals,
            sketches.layout,
            communicator,
            self._engine.everyone,
            work=Work(hops=1, transposes=2),
            exchange="boundary",
            kernel=self._whole.operator.kernel,
            bucket_elements=bucket_elements(communicator.device),
        )
        workspace = Workspace(plan.operators, communicator.device)
        self.spectrometer = Spectrometer(sketches, plan.operators, workspace, communicator)
        if self.statistics is not None:
            self.statistics.use_graph(self.spectrometer, is_new)
            return
        is_followed = is_adaptive(self._whole)
        self.statistics = GradientStatistics(
            sketches,
            self.spectrometer,
            bands=(self._whole.filter if is_followed else self._whole.monitor).bands,
            decay=self._decay,
            keeps_mean=self.features is None,
        )

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

    def takes_sample(self, step: int) -> bool:
        """Whether a sample of the gradient is due."""
        return self.statistics is not None and step % self._whole.statistics.interval == 0

    def observe(
        self,
        step: int,
        gradients: Sequence[torch.Tensor | None],
        scale: float,
        is_finite: torch.Tensor | None = None,
    ) -> None:
        """Take a sample of the gradient on steps where it is due (collective).

        Args:
            is_finite: (), bool: whether all other gradients are, on all ranks; None: yes.
        """
        if self.statistics is not None and self.takes_sample(step):
            is_finite = self.statistics.observe(gradients, scale, is_finite)
            if self.features is not None:
                self.features.add(self.features.take(gradients, scale), is_finite)

    def describe(self) -> str:
        """What it is and how it filters, for people."""
        return (
            f"{self.graph.describe()}; {self.plan.describe()}; filter "
            f"{self._whole.filter.response} {self.filter.transfer.describe()}; scratch "
            f"{self.workspace.bytes / 2**20:.1f} MiB on this rank"
        )

    def eigenpairs(self, k: int) -> list[Eigenpairs]:
        """The k lowest eigenpairs of every group of joined parameters (collective).

        Raises:
            NotConvergedError: the solver did not reach its residual; on all ranks.
            ValueError: k is not an integer >= 1.
        """
        _require_count("k", k)
        is_shown = self._engine.everyone.rank == 0
        with progress("eigenpairs", len(self.graph.groups), "group", is_shown) as update:
            return lowest_eigenpairs(
                self.graph, k, self._engine.communicator, seed=self._whole.seed, progress=update
            )

    def density(self, bins: int) -> Density:
        """Share of the eigenvalues in each of equal bins of [0, λ_max] (collective).

        Raises:
            ValueError: bins is not an integer >= 1.
        """
        _require_count("bins", bins)
        return density_of_states(self.graph, bins, self._engine.communicator, seed=self._whole.seed)

    def signal_to_noise(self) -> SignalToNoise:
        """Signal, noise and their ratio per band of frequency, from the samples so far.

        Raises:
            RuntimeError: nothing is sampled: the monitor is off and nothing else needs it.
        """
        if self.statistics is None:
            raise RuntimeError(
                "signal and noise are not measured: set spectral_ds.monitor.enabled to true, and "
                "graph.node to row or column"
            )
        return self.statistics.signal_to_noise()


def _require_count(name: str, value: object) -> None:
    if not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"{name} = {value!r}: must be an integer >= 1")
