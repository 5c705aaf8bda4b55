"""Stages: a graph of the configuration, with the operators, statistics and filter that act on it.

In: the configuration and an engine. Out: `Stage`s, which `plugin.py` calls at each step.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch

from spectral_ds.config import ADAPTIVE, FilterConfig, GraphConfig, SpectralConfig
from spectral_ds.config_sources import SpectralConfigError
from spectral_ds.engines import Engine
from spectral_ds.filters import (
    MAX_ORDER,
    NO_SERIES,
    BandTransfer,
    FixedTransfer,
    GraphFilter,
    GraphFunction,
    GraphPenalty,
    Heat,
    Identity,
    Polynomial,
    Response,
    Tikhonov,
    ToleranceError,
    Transfer,
    Window,
    filter_work,
    penalty_work,
    whiten_gains,
    wiener_gains,
)
from spectral_ds.graph import (
    Depth,
    EdgeFamily,
    Edges,
    NodeKind,
    Pair,
    ParameterNodes,
    Ring,
    Similarity,
    match_parameters,
)
from spectral_ds.laplacian import (
    ExchangeName,
    FeatureSource,
    KernelName,
    OperatorPlan,
    ParameterGraph,
    WeightFeatures,
    Work,
    Workspace,
    make_plan,
)
from spectral_ds.laplacian.buckets import parameters_with_edges
from spectral_ds.laplacian.features import no_features
from spectral_ds.laplacian.sketches import Sketches
from spectral_ds.progress import progress
from spectral_ds.sharding import ShardLayout
from spectral_ds.spectrum import (
    COEFFICIENTS_PER_BAND,
    GradientStatistics,
    RunningSketch,
    Spectrometer,
    equal_edges,
)

SKETCH_WIDTH = 64
# For the monitor alone: the spectrum of a signal of many nodes needs no more columns. Short signals
# are cheap as they are.
MONITOR_SKETCH_WIDTH, LONGEST_WHOLE = 16, 128
# lowpass, highpass, bandpass: edges are smooth over about π/32 of the spectrum.
STEP_ORDER = 31


def bucket_elements(device: torch.device) -> int:
    """How many elements of a bucket a rank stores at most.

    On CPUs a bucket should stay in the cache (measured on 53 M elements: 1.9 times faster);
    accelerators want fewer and larger launches.
    """
    return 2**19 if device.type == "cpu" else 2**26


def below_shard(most: int, elements: int, world_size: int) -> int:
    """The same, so that scratch memory takes at most about the mean shard.

    Scratch memory is three matrices of a bucket, and two buffers of what is exchanged. Shards below
    5 · 2**24 elements may take more: smaller buckets would cost more collectives than memory.

    Args:
        most: from `bucket_elements`.
        elements: of all ranks together.
    """
    return min(most, max(2**24, elements // world_size // 5))


class Stage:
    """One graph of the stack, with all that acts on it. Made and rebuilt collectively.

    Args:
        parameters: the nodes of the parameters that the graph covers.
        config: the graph's part of the configuration.
        whole: all of it.
        engine: whose gradients are filtered.
        layout: the fragments of all ranks.
        ridge: ρ of the regularizer on this graph.

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
        parameters: Sequence[ParameterNodes],
        config: GraphConfig,
        whole: SpectralConfig,
        engine: Engine,
        layout: ShardLayout,
        ridge: float,
    ) -> None:
        self.parameters = tuple(parameters)
        self.statistics: GradientStatistics | None = None
        self._config, self._whole = config, whole
        self._engine, self._layout = engine, layout
        self._ridge = ridge
        width, shape = feature_width(config), sketch_shape(config, whole)
        self.features: RunningSketch | None = None
        seed = whole.seed
        if width is not None:
            self.features = RunningSketch(self._make_sketches(width, 0, seed), self._decay)
            # In the projection that has chosen them, neighbours look more alike than they are.
            seed = (seed + 1) % 2**63
        self._sketches = None if shape is None else self._make_sketches(*shape, seed)
        self._is_in_use = False
        self.build()
        self._is_in_use = True

    @property
    def _decay(self) -> float:
        return self._whole.statistics.decay

    @property
    def running(self) -> dict[str, RunningSketch]:
        """What checkpoints carry of the gradient's sketches, by name."""
        found = {} if self.statistics is None else {"sketch": self.statistics.running}
        return found if self.features is None else {**found, "features": self.features}

    def _make_sketches(self, width: int, longest_whole: int, seed: int) -> Sketches:
        families = edge_families(self._config, self._engine)
        return Sketches(
            parameters_with_edges(self.parameters, families) or self.parameters,
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
                edge_families(self._config, self._engine),
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

    def restore(self, edges: Edges, is_ready: bool) -> None:
        """Go on with the graph of a saved state, the statistics being restored (collective).

        Args:
            edges: all edges, as `ParameterGraph.primary_edges` numbers nodes.
            is_ready: whether the saved filter acted.
        """
        self.graph = ParameterGraph.of_edges(
            self.parameters,
            edge_families(self._config, self._engine),
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
        transfer = self._transfer(self._whole.filter)
        penalty = self._penalty_transfer()
        self._filter_work = filter_work(self._whole.filter, transfer.hops, transfer.is_identity)
        hops = 0 if penalty is None else penalty.hops
        self._penalty_work = penalty_work(self._whole.regularizer, hops)
        self.plan = make_plan(
            self.graph,
            self._layout,
            communicator,
            everyone,
            work=self._filter_work + self._penalty_work,
            exchange=cast(ExchangeName, self._whole.operator.exchange),
            kernel=cast(KernelName, self._whole.operator.kernel),
            bucket_elements=below_shard(
                bucket_elements(device),
                sum(parameter.numel for parameter in self.parameters),
                communicator.world_size,
            ),
        )
        works = {"filter": self._filter_work, "regularizer": self._penalty_work}
        for key, work in works.items():
            if work.hops >= NO_SERIES and self.plan.meetings["boundary"]:
                raise SpectralConfigError(
                    "spectral_ds.operator.exchange = boundary: no Chebyshev series of "
                    f"spectral_ds.{key}.response = {getattr(self._whole, key).response} is close "
                    "enough to its exact values on depth paths; use auto or transpose"
                )
        self.workspace = Workspace(self.plan.operators, device)
        if self._sketches is None:
            self.spectrometer = Spectrometer(
                None, self.plan.operators, self.workspace, communicator
            )
        self.filter = GraphFilter(self.plan.operators, self.workspace, transfer, is_ready)
        if penalty is not None:
            function = GraphFunction(self.plan.operators, penalty)
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
        plan = make_plan(
            signals,
            sketches.layout,
            communicator,
            self._engine.everyone,
            work=Work(hops=1, moves=2),
            exchange="boundary",
            kernel=cast(KernelName, self._whole.operator.kernel),
            bucket_elements=bucket_elements(communicator.device),
        )
        workspace = Workspace(plan.operators, communicator.device)
        self.spectrometer = Spectrometer(sketches, plan.operators, workspace, communicator)
        if self.statistics is not None:
            self.statistics.use_graph(self.spectrometer, is_new)
            return
        is_adaptive = _is_adaptive(self._whole)
        self.statistics = GradientStatistics(
            sketches,
            self.spectrometer,
            bands=self._whole.filter.bands if is_adaptive else self._whole.monitor.bands,
            decay=self._decay,
            keeps_mean=self.features is None,
        )

    def _penalty_transfer(self) -> Transfer | None:
        """r of the regularizer; None without one."""
        settings = self._whole.regularizer
        if settings.strength == 0:
            return None
        if settings.response == "laplacian":
            device = self._engine.communicator.device
            return FixedTransfer(Polynomial((0.0, 1.0)), self.graph, "auto", 1e-3, device)
        return self._transfer(replace(self._whole.filter, response=settings.response))

    def _transfer(self, settings: FilterConfig) -> Transfer:
        device = self._engine.communicator.device
        if settings.response in ADAPTIVE:
            assert self.statistics is not None, "adaptive responses have them"
            return adaptive_transfer(settings, self.statistics, device)
        steps = step_gains(settings)
        if steps is not None:
            edges, gains, order = steps
            constant = torch.tensor(gains, dtype=torch.float64, device=device)
            return BandTransfer(edges, lambda: constant, lambda: 0, order, device)
        try:
            return FixedTransfer(
                smooth_response(settings), self.graph, settings.order, settings.tolerance, device
            )
        except ToleranceError as error:
            if not self._is_in_use:
                raise SpectralConfigError(f"spectral_ds.{error}") from error
            # A new graph has another spectrum: training must not end of it.
            self._engine.log(f"{error}; order {MAX_ORDER} is used", logging.WARNING)
            return FixedTransfer(
                smooth_response(settings), self.graph, MAX_ORDER, settings.tolerance, device
            )

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
        return self.plan.bytes_of(self._penalty_work + (self._filter_work if acts else Work()))

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


def _is_adaptive(config: SpectralConfig) -> bool:
    return bool({config.filter.response, config.regularizer.response} & set(ADAPTIVE))


def feature_width(graph: GraphConfig) -> int | None:
    """Width of the sketches that similarity of gradients compares; None without it."""
    widths = [edge.sketch_width for edge in graph.edges if edge.features == "gradient"]
    return widths[0] if widths else None


def sketch_shape(graph: GraphConfig, config: SpectralConfig) -> tuple[int, int] | None:
    """(width, longest signal that stays whole) of the sketches that are measured on a graph.

    None if nobody needs them. Where gradients are compared, they say which samples are finite.
    """
    if _is_adaptive(config):
        return SKETCH_WIDTH, 0
    # An element's signal is one number: its sketch would be a second gradient.
    is_shown = config.monitor.enabled and graph.node != "element"
    if is_shown or feature_width(graph) is not None:
        return MONITOR_SKETCH_WIDTH, LONGEST_WHOLE
    return None


def choose_parameters(
    shapes: Mapping[str, tuple[int, ...]], config: GraphConfig, key: str
) -> list[ParameterNodes]:
    """The parameters that the patterns of a graph choose.

    Args:
        key: where the graph stands in the configuration.

    Raises:
        SpectralConfigError: a pattern that the user wrote matches no parameter, or none is left.
    """
    chosen, unmatched = match_parameters(shapes, config.include, config.exclude)
    defaults = GraphConfig()
    for name in ("include", "exclude"):
        for pattern in getattr(config, name):
            if pattern in unmatched and pattern not in getattr(defaults, name):
                raise SpectralConfigError(
                    f"spectral_ds.{key}.{name}: pattern {pattern!r} matches no trainable "
                    f"parameter; there are {len(shapes)}, for example {_some(shapes)}"
                )
    if not chosen:
        raise SpectralConfigError(
            f"spectral_ds.{key}: no parameter is left to filter; include {list(config.include)} "
            f"without exclude {list(config.exclude)} leaves none of {len(shapes)} trainable "
            f"parameters, for example {_some(shapes)}"
        )
    return [ParameterNodes(name, shapes[name], cast(NodeKind, config.node)) for name in chosen]


def _some(names: Mapping[str, object]) -> str:
    return ", ".join(list(names)[:3]) or "none"


def edge_families(config: GraphConfig, engine: Engine) -> list[EdgeFamily]:
    """The edge families of a graph."""
    families: list[EdgeFamily] = []
    for edge in config.edges:
        if edge.family == "depth":
            families.append(Depth(edge.weight))
        elif edge.family == "ring":
            families.append(Ring(edge.weight))
        elif edge.family == "pair":
            families.append(Pair(edge.head_width or head_width_of(engine), edge.weight))
        else:
            families.append(
                Similarity(
                    edge.neighbours,
                    cast(Literal["parameter", "role"], edge.scope),
                    cast(Literal["weights", "gradient"], edge.features),
                    edge.sketch_width,
                    edge.weight,
                )
            )
    return families


def head_width_of(engine: Engine) -> int | None:
    """Rows of an attention head, as the model's own config has it; None if it does not say."""
    modules = (m for holder in engine.holders for m in getattr(holder, "modules", list)())
    for module in modules:
        config: Any = getattr(module, "config", None)
        heads = getattr(config, "num_attention_heads", None)
        if heads:
            return int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return None


def smooth_response(settings: FilterConfig) -> Response:
    """The response of a formula in λ."""
    responses: dict[str, Response] = {
        "identity": Identity(),
        "heat": Heat(settings.tau),
        "tikhonov": Tikhonov(settings.tau),
        "window": Window(settings.alpha),
        "polynomial": Polynomial(settings.coefficients),
    }
    return responses[settings.response]


def step_gains(
    settings: FilterConfig,
) -> tuple[Sequence[float], Sequence[float], int] | None:
    """(edges, gains, order) of a response by fixed gains of bands; None for any other."""
    steps: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        "lowpass": ((0, settings.cutoff, 1), (1, 0)),
        "highpass": ((0, settings.cutoff, 1), (0, 1)),
        "bandpass": ((0, settings.low, settings.high, 1), (0, 1, 0)),
        "bands": (list(equal_edges(len(settings.gains))), settings.gains),
    }
    if settings.response not in steps:
        return None
    edges, gains = steps[settings.response]
    usual = STEP_ORDER
    if settings.response == "bands":
        usual = max(STEP_ORDER, COEFFICIENTS_PER_BAND * len(gains) - 1)
    return edges, gains, settings.order if isinstance(settings.order, int) else usual


def adaptive_transfer(
    settings: FilterConfig, statistics: GradientStatistics, device: torch.device
) -> Transfer:
    """A response whose gains follow the statistics."""

    def gains() -> torch.Tensor:
        if settings.response == "wiener":
            return wiener_gains(statistics.estimate)
        return whiten_gains(statistics.power, settings.power)

    usual = COEFFICIENTS_PER_BAND * settings.bands - 1
    return BandTransfer(
        equal_edges(settings.bands),
        gains,
        lambda: statistics.samples,
        settings.order if isinstance(settings.order, int) else usual,
        device,
    )
