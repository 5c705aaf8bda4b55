"""The whole plan: what a configuration takes of each rank, from shapes alone.

In: a model's shapes, a configuration, an engine and the ranks. Out: a `Plan`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np
from torch import nn

from spectral_ds.config import SpectralConfig
from spectral_ds.graph import parameter_nodes
from spectral_ds.planning.coactivation import PlannedCoactivation, plan_coactivation
from spectral_ds.planning.costs import Cost, Machine
from spectral_ds.planning.flows import FLOAT, Cluster, Floats, Flow
from spectral_ds.planning.graphs import PlannedGraph, plan_graph
from spectral_ds.planning.layouts import EngineName, cut_parameters
from spectral_ds.stack import ModelFacts, choose_graphs, facts_of, sites_among

# What a rank's Python keeps of every run of every rank (measured): a fragment; and, where
# statistics are taken, a span of nodes with its rectangles.
RUN_BYTES = 170
RUN_OF_SKETCHES_BYTES = 760


@dataclass(frozen=True)
class Model:
    """What a plan knows of a model.

    Attributes:
        name: as the user wrote it.
        shapes: of its trainable parameters, in model order.
        elements: of all parameters.
        facts: what its modules tell of them.
        with_inputs: names of those that multiply activations; see `coactivation.sites_of`.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    elements: int
    facts: ModelFacts = field(default_factory=ModelFacts)
    with_inputs: frozenset[str] = frozenset()

    @classmethod
    def of(cls, name: str, module: nn.Module) -> "Model":
        """What shapes and types of modules tell; the weights may be on the meta device."""
        trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
        shapes = {n: tuple(parameter.shape) for n, parameter in trainable.items()}
        facts = facts_of([module], trainable)
        nodes = parameter_nodes(shapes, "column", facts.storage).values()
        sites = sites_among([module], trainable, nodes)
        return cls(
            name,
            shapes,
            sum(parameter.numel() for parameter in module.parameters()),
            facts,
            frozenset(site.parameter for site in sites),
        )


AnyPlannedGraph: TypeAlias = PlannedGraph | PlannedCoactivation


@dataclass(frozen=True, eq=False)
class Plan:
    """What one configuration takes; (world size,) where it says by rank.

    Attributes:
        model, config, engine, cluster, machine, bucket_elements: what it was made for.
        graphs: the graphs that filter one after another.
        elements: how many are filtered, by rank.
        device_memory, host_memory: bytes by what for; by rank.
        cost: of one step in which the filter acts.
        calibration: bytes on each rank's device while activations are looked at, before training.
    """

    model: Model
    config: SpectralConfig
    engine: EngineName
    cluster: Cluster
    machine: Machine
    bucket_elements: int
    graphs: tuple[AnyPlannedGraph, ...]
    elements: Floats
    device_memory: dict[str, Floats]
    host_memory: dict[str, Floats]
    cost: Cost
    calibration: int

    @property
    def bytes_sent(self) -> int:
        """Bytes that all ranks send in a step."""
        return self.cost.flow.total

    @cached_property
    def seconds(self) -> Floats:
        """What the filter and the regularizer add to a step; by rank."""
        return self.cost.computing(self.machine) + self.cost.communicating(self.machine)

    def instead(
        self, engine: EngineName | None = None, config: SpectralConfig | None = None
    ) -> "Plan":
        """The plan under another engine or configuration, parameters in one group."""
        return plan_configuration(
            self.model,
            config or self.config,
            engine or self.engine,
            self.cluster,
            self.machine,
            self.bucket_elements,
        )


def plan_configuration(
    model: Model,
    config: SpectralConfig,
    engine: EngineName,
    cluster: Cluster,
    machine: Machine,
    bucket_elements: int,
    groups: Sequence[Sequence[str]] | None = None,
) -> Plan:
    """What a configuration takes of each rank.

    Args:
        bucket_elements: see `spectral_ds.geometry.buckets.bucket_elements`.
        groups: the optimizer's parameter groups, see `cut_parameters`.

    Raises:
        SpectralConfigError: it cannot be used with the model.
    """
    cuts = cut_parameters(engine, model.shapes, cluster.world_size, groups)
    choices = choose_graphs(model.shapes, config, model.facts)
    graphs: list[AnyPlannedGraph] = [
        plan_coactivation(choice, config, cuts, cluster, bucket_elements, model.with_inputs)
        if choice.is_coactivation
        else plan_graph(choice, config, cuts, cluster, bucket_elements, is_first=index == 0)
        for index, choice in enumerate(choices)
    ]
    filtered = {parameter.name for graph in graphs for parameter in graph.parameters}
    elements = sum(
        (cluster.by_rank(cuts[n].rank, np.diff(cuts[n].bounds)) for n in sorted(filtered)),
        np.zeros(cluster.world_size),
    )
    device, host = _memory(graphs, config, elements)
    runs = sum(len(cut.rank) for cut in cuts.values())
    measured = RUN_OF_SKETCHES_BYTES if device["statistics"].any() else 0
    host["layout"] = np.full_like(elements, float(runs * (RUN_BYTES + measured)))
    return Plan(
        model,
        config,
        engine,
        cluster,
        machine,
        bucket_elements,
        tuple(graphs),
        elements,
        device,
        host,
        _cost(graphs, config, elements, cluster),
        # One graph after another is looked at.
        max((g.calibration for g in graphs if isinstance(g, PlannedCoactivation)), default=0),
    )


def _memory(
    graphs: Sequence[AnyPlannedGraph], config: SpectralConfig, elements: Floats
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Bytes by what for, by rank: on the device, and on its host."""
    shard, none = FLOAT * elements, np.zeros_like(elements)
    regularizer = config.regularizer
    has_reference = regularizer.strength > 0 and regularizer.reference == "pretrained"

    def of_graphs(kind: str) -> Floats:
        return sum((graph.memory.get(kind, none) for graph in graphs), none)

    device = {kind: of_graphs(kind) for kind in ("kernels", "scratch", "statistics")}
    host = {"edges": of_graphs("edges")}
    if config.has_activations:
        device["directions"] = of_graphs("directions")
        host["known directions"] = of_graphs("known directions")
    if has_reference:
        (host if regularizer.reference_device == "cpu" else device)["reference"] = shard
    if config.filter.apply_to == "update":
        device["weights before the step"] = shard
    if config.filter.temporal is not None:
        device["running mean"] = shard
    return device, host


def _cost(
    graphs: Sequence[AnyPlannedGraph], config: SpectralConfig, elements: Floats, cluster: Cluster
) -> Cost:
    """What one step costs. Passes over all elements are counted by what they read and write."""

    def passes(numbers_each: int) -> Cost:
        return Cost.of_elements(elements, FLOAT * numbers_each, cluster)

    def sums(collectives: int) -> Cost:  # of a few numbers
        none = np.zeros_like(elements)
        return Cost(Flow.none(cluster), none, none, collectives)

    cost, acts = sums(0), any(graph.filter is not None for graph in graphs)
    for graph in graphs:
        if graph.filter is not None:
            cost = cost + graph.filter
        if graph.penalty is not None:
            # θ − θ_ref; added to the target.
            cost = cost + graph.penalty + passes(3) + passes(3)
    if acts and config.filter.apply_to == "update":
        cost = cost + passes(2) + passes(3) + passes(3)  # copy, subtract, add
    if acts and config.filter.rescale == "norm":
        cost = cost + passes(1) + passes(1) + passes(2) + sums(2)  # norms before and after
    if config.filter.temporal is not None:
        # Whether all is finite: what is filtered, and what is not.
        is_of_gradients = config.filter.apply_to == "gradient"
        cost = cost + passes(5) + sums(1 + is_of_gradients)
    return cost
