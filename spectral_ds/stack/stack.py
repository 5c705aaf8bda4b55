"""Stack: the graphs of a configuration, one after another, and what acts on signals by them."""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from spectral_ds.checkpoint import Part
from spectral_ds.coactivation import user_batches
from spectral_ds.config import FilterConfig, RegularizerConfig, SpectralConfig, SpectralConfigError
from spectral_ds.engines import Engine
from spectral_ds.filters import (
    NormKeeper,
    Reference,
    Regularizer,
    SpectralFilter,
    StrengthSchedule,
    TemporalFilter,
)
from spectral_ds.laplacian import KernelUnavailableError, require_kernel
from spectral_ds.sharding import Fragment, ShardLayout, Signal
from spectral_ds.stack.choices import GraphChoice, choose_graphs, refuse_sparse
from spectral_ds.stack.coactivation_graph import CoactivationGraph
from spectral_ds.stack.modules import facts_of
from spectral_ds.stack.stacked_graph import StackedGraph

AnyGraph = StackedGraph | CoactivationGraph


class Stack:
    """All graphs of one plugin. Made on all ranks (collective).

    Args:
        engine: whose gradients are filtered.
        config: all of the configuration.
        previous: that this one replaces, of the same engine and configuration.
        kept: the parameters of both, in an order equal on all ranks.

    Attributes:
        is_filtered: whether each of the engine's fragments is of a parameter in some graph.
        graphs: each takes what the one before it gave.
        filter: (1 − s) + s · h(L) of all graphs, and what else acts on a signal.
        regularizer: the term of all graphs; None without one.

    Raises:
        SpectralConfigError: the configuration cannot be used with the model, or not here.
        ValueError: ranks train different models.
    """

    def __init__(
        self,
        engine: Engine,
        config: SpectralConfig,
        previous: "Stack | None" = None,
        kept: Sequence[str] = (),
    ) -> None:
        self._engine = engine
        choices = self._choices = agree_on_graphs(engine, config)
        layout = ShardLayout.gather(engine.fragments, engine.communicator)
        nodes = {node.name: node for choice in choices for node in choice.parameters}
        layout.check({name: node.numel for name, node in nodes.items()})
        self.is_filtered = [fragment.parameter in nodes for fragment in engine.fragments]
        self.graphs: list[AnyGraph] = []
        try:
            for index, choice in enumerate(choices):
                self.graphs.append(
                    CoactivationGraph(
                        index, choice, config, engine, layout, _activations(previous, index), kept
                    )
                    if choice.is_coactivation
                    else StackedGraph(index, choice, config, engine, layout)
                )
            self.filter = self._make_filter(config.filter, list(nodes))
            self.regularizer = self._make_regularizer(config.regularizer)
        except BaseException:  # refused: graphs may have hooks
            self.forget()
            raise
        self._is_overdue = False  # whether a graph was not built because ranks had left

    def graph(self, number: int) -> AnyGraph:
        """One of the graphs.

        Raises:
            ValueError: there is none of this number.
        """
        if number not in range(len(self.graphs)):
            count = len(self.graphs)
            raise ValueError(
                f"graph = {number!r}: must be the number of one of {count} graphs, from 0"
            )
        return self.graphs[number]

    def only_filtered(self, fragments: Signal) -> Signal:
        """A value a fragment, None in place of those that are in no graph."""
        pairs = zip(fragments, self.is_filtered, strict=True)
        return [fragment if chosen else None for fragment, chosen in pairs]

    def without_filtered(self, fragments: Signal) -> list[torch.Tensor | None]:
        """The values of the fragments that are in no graph, alone."""
        pairs = zip(fragments, self.is_filtered, strict=True)
        return [fragment for fragment, chosen in pairs if not chosen]

    def refuse_sparse(self, names: Collection[str]) -> None:
        """Refuse a step in which the gradient of a parameter in some graph is sparse.

        Args:
            names: of the parameters whose gradients are.

        Raises:
            SpectralConfigError: there is one.
        """
        for choice in self._choices if names else ():
            refuse_sparse([node.name for node in choice.parameters], names, choice.key)

    def weights(self) -> Signal:
        """The engine's weights, None in place of those that are in no graph."""
        return self.only_filtered(self._engine.weights())

    def warn_of_unstable_pull(self) -> None:
        """Warn where θ ← θ − lr · α (r(L) + ρI) Δ overshoots: lr · α (r + ρ) > 1.

        The step on graphs of activations does not.
        """
        if self.regularizer is None:
            return
        by_edges = [graph.penalty for graph in self.graphs if isinstance(graph, StackedGraph)]
        largest = max([0.0, *(penalty.largest() for penalty in by_edges if penalty is not None)])
        rate = max([0.0, *self._engine.learning_rates()])
        if (step := rate * self.regularizer.strength * largest) > 1:
            self._engine.log(
                f"learning rate {rate:g} x regularizer.strength x largest r + ridge = "
                f"{step:.3g} > 1: the decoupled regularizer overshoots; lower its strength",
                logging.WARNING,
            )

    @property
    def memories(self) -> list[Part]:
        """What has state that depends on no graph."""
        reference = None if self.regularizer is None else self.regularizer.reference
        return [part for part in (self.filter.temporal, reference) if part is not None]

    def rebuild(self) -> None:
        """Make graphs of what the model is now (collective)."""
        for graph in self.graphs:
            graph.build()
        self._is_overdue = False

    def begin_step(self, step: int) -> None:
        """Use what graphs have waited for, if it is there (collective)."""
        for graph in self.graphs:
            graph.begin_step(step)

    def warn_of_end(self) -> None:
        """Warn where training ends while a filter waits for what it needs."""
        for graph in self.graphs:
            if isinstance(graph, CoactivationGraph):
                graph.warn_of_end()

    def forget(self) -> None:
        """Take back what hooks the model."""
        for graph in self.graphs:
            graph.forget()

    def calibrate(self, batches: Sequence[Any]) -> None:
        """Keep what the model knows of these inputs; see `Study.calibrate` (collective)."""
        if not batches:
            raise ValueError("batches: there is none")
        for graph in self._of_activations():
            graph.calibrate(user_batches(batches))

    def save_activations(self, path: Path) -> None:
        """See `Study.save_activations` (collective)."""
        graph = self._of_activations()[0]
        with self._engine.everyone.all_or_none():
            if self._engine.everyone.rank == 0:
                graph.save(path)

    def _of_activations(self) -> list[CoactivationGraph]:
        found = [graph for graph in self.graphs if isinstance(graph, CoactivationGraph)]
        if not found:
            raise ValueError("no graph of the configuration is of family activations")
        return found

    def may_act(self, step: int) -> bool:
        """Whether the filter acts at a step, or graphs are built in it by which it may."""
        return not self.filter.is_idle(step) or any(graph.is_due(step) for graph in self.graphs)

    def refresh(self, step: int) -> None:
        """Build the graphs anew that are due at this step (collective).

        Where ranks may have left, that waits for `catch_up`.
        """
        due = [graph for graph in self.graphs if graph.is_due(step)]
        if due and not self._engine.is_complete:
            self._is_overdue = True
            return
        for graph in due:
            graph.build()

    def catch_up(self) -> None:
        """Build the graphs that have waited for all ranks (collective)."""
        if self._engine.everyone.maximum(float(self._is_overdue)) > 0:
            self.rebuild()

    def take_over(self, other: "Stack", names: Collection[str]) -> None:
        """Go on with what another stack knows of these parameters (collective)."""
        if self.filter.temporal is not None and other.filter.temporal is not None:
            self.filter.temporal.take_over(other.filter.temporal, names)
        if self.regularizer is not None and other.regularizer is not None:
            self.regularizer.reference.take_over(other.regularizer.reference, names)
        for mine, theirs in zip(self.graphs, other.graphs, strict=True):
            mine.take_over(theirs, names)

    def begin_anew(self) -> None:
        """Make graphs of the present weights, which are the reference from now on (collective)."""
        if self.regularizer is not None:
            self.regularizer.reference.move_to(self.weights())
        self.rebuild()

    def bytes_sent(self, strength: float) -> int:
        """Bytes that all ranks together send in one step at this strength of the filter."""
        return sum(graph.bytes_sent(strength) for graph in self.graphs)

    @property
    def _filtered_fragments(self) -> list[Fragment | None]:
        pairs = zip(self._engine.fragments, self.is_filtered, strict=True)
        return [fragment if chosen else None for fragment, chosen in pairs]

    def _make_filter(self, settings: FilterConfig, names: Sequence[str]) -> SpectralFilter:
        engine, communicator = self._engine, self._engine.communicator
        norms = temporal = None
        if settings.rescale == "norm":
            number = {name: index for index, name in enumerate(names)}
            # Fragments that are not filtered share a number of their own.
            owners = [number.get(f.parameter, len(names)) for f in engine.fragments]
            norms = NormKeeper(owners, len(names) + 1, communicator)
        if settings.temporal is not None:
            temporal = TemporalFilter(
                self._filtered_fragments,
                list(engine.shapes),
                communicator,
                decay=settings.temporal.decay,
                amplify=settings.temporal.amplify,
            )
        schedule = StrengthSchedule(
            settings.strength, settings.warmup_steps, settings.decay_steps, settings.interval
        )
        return SpectralFilter(
            lambda: [graph.filter for graph in self.graphs], schedule, norms, temporal
        )

    def _make_regularizer(self, settings: RegularizerConfig) -> Regularizer | None:
        if settings.strength == 0:
            return None
        weights = self.weights() if settings.reference == "pretrained" else None
        device = torch.device("cpu") if settings.reference_device == "cpu" else None
        return Regularizer(
            lambda: [graph.penalty for graph in self.graphs if graph.penalty is not None],
            Reference(self._filtered_fragments, weights, device),
            settings.strength,
            self._engine.communicator,
        )


def _activations(previous: Stack | None, index: int) -> CoactivationGraph | None:
    graph = None if previous is None else previous.graphs[index]
    return graph if isinstance(graph, CoactivationGraph) else None


def agree_on_graphs(engine: Engine, config: SpectralConfig) -> list[GraphChoice]:
    """What each graph is made of, equal on all ranks (collective).

    Raises:
        SpectralConfigError: the configuration cannot be used with the model, or not here.
        ValueError: ranks train different models.
    """
    facts = facts_of(engine.holders, engine.named)
    models = engine.everyone.gather_objects(list(engine.shapes.items()))
    with engine.everyone.all_or_none():
        for rank, shapes in enumerate(models):
            if shapes != models[0]:
                raise ValueError(_difference(rank, dict(shapes), dict(models[0])))
        choices = choose_graphs(engine.shapes, config, facts)
        try:
            everyone = engine.everyone
            require_kernel(config.operator.kernel, everyone.device, everyone.rank == 0)
        except KernelUnavailableError as error:
            raise SpectralConfigError(f"spectral_ds.{error}") from error
    return choices


def _difference(
    rank: int, shapes: Mapping[str, tuple[int, ...]], first: Mapping[str, tuple[int, ...]]
) -> str:
    """How the trainable parameters of a rank differ from those of rank 0."""
    for name in (*first, *shapes):
        if first.get(name) != shapes.get(name):
            return (
                f"ranks train different models: parameter {name!r} has shape {first.get(name)} "
                f"on rank 0 and {shapes.get(name)} on rank {rank}"
            )
    return f"ranks train different models: parameters are in another order on rank {rank}"
