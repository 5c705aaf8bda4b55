"""Everything that `spectral-ds inspect` measures, in the order in which it is needed.

Half of the gradients make the graphs that follow gradients, the other half judges all graphs: on
the gradients it was made from, a graph of similar gradients looks smooth even where all is noise.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from spectral_ds.cli.inspect.activity import ActivityMeasurement, ActivityReport
from spectral_ds.cli.inspect.activity_sources import of_configuration, of_data
from spectral_ds.cli.inspect.batches import Batch
from spectral_ds.cli.inspect.candidates import (
    Candidate,
    CandidateResult,
    candidates,
    measured_result,
    ranked,
    unmeasured_result,
)
from spectral_ds.cli.inspect.gradients import MeanGradient, gradients_of, statistics_on
from spectral_ds.cli.inspect.graph_properties import GraphProperties, InspectedGraph
from spectral_ds.cli.inspect.model_under_test import ModelUnderTest
from spectral_ds.cli.inspect.report import GraphReport
from spectral_ds.config import EdgeConfig, GraphConfig, SpectralConfig
from spectral_ds.console.progress import progress
from spectral_ds.graph import Storage, UnknownHeadWidthError
from spectral_ds.laplacian import ParameterGraph
from spectral_ds.sharding import Signal
from spectral_ds.sketches import no_features
from spectral_ds.stack.choices import feature_width

BANDS = 8
BINS = 32


class Inspection:
    """Measures one model.

    Args:
        model: whose parameters, and gradients, are looked at.
        config: whose graphs are looked at.
        eigenvalues: how many of the lowest are wanted.

    Raises:
        SpectralConfigError: a graph cannot be built; see `choose_graphs`.
        UserError: a graph has too many nodes.
    """

    def __init__(self, model: ModelUnderTest, config: SpectralConfig, eigenvalues: int) -> None:
        self._model, self._config, self._eigenvalues = model, config, eigenvalues
        choices = model.graphs(config)
        self._graphs = {c.key: c.settings for c in choices if not c.is_coactivation}
        self._of_activations = [choice for choice in choices if choice.is_coactivation]
        self._activities: list[ActivityMeasurement] = []
        self.candidates: list[Candidate] = candidates(config.stack)
        self._means: dict[GraphConfig, MeanGradient] = {}
        self._made: dict[tuple[GraphConfig, GraphConfig], ParameterGraph] = {}
        self._judging: Sequence[Batch] = ()

    def take_means(self, batches: Sequence[Batch]) -> None:
        """Take the mean gradient of the first half of the batches; the rest is to judge by."""
        half = len(batches) // 2
        self._judging = batches[half:]
        by_key: dict[object, MeanGradient] = {}
        for graph in (*self._graphs.values(), *(each.graph for each in self.candidates)):
            width = feature_width(graph)
            if width is not None:
                key = graph.node, graph.include, graph.exclude, width
                if key not in by_key:
                    by_key[key] = MeanGradient(self._model, self._model.nodes(graph), width)
                self._means[graph] = by_key[key]
        torch.manual_seed(self._config.seed)  # of dropout
        for gradients in self._gradients(batches[:half], "gradients that make graphs"):
            for mean in by_key.values():
                mean.observe(gradients)

    def look_at_activations(self, batches: Sequence[Batch] = ()) -> None:
        """Look at the activations of the text, of random tokens, and of what is configured.

        Args:
            batches: of the text, of which the first half is looked at; none without data.
        """
        seed = self._config.seed
        if batches:
            half = batches[: len(batches) // 2]
            self._activities += of_data(self._model, self._config.stack[0], half, seed)
        self._activities += of_configuration(
            self._model, self._of_activations, has_data=bool(batches), seed=seed
        )

    def activities(self) -> list[ActivityReport]:
        """What directions are active, and how much of the judging gradients goes along them."""
        return [each.report() for each in self._activities]

    def graphs(self) -> list[GraphReport]:
        """What the configured graphs are like."""
        reports = []
        for key, graph in self._graphs.items():
            inspected = self._inspected(graph, graph)
            whole = inspected.whole()
            families = {"edges[0]: " + _words(graph.edges[0]): whole}
            if len(graph.edges) > 1:
                families = {
                    f"edges[{index}]: {_words(edge)}": self._inspected(
                        replace(graph, edges=(edge,)), graph
                    ).whole()
                    for index, edge in enumerate(graph.edges)
                }
            roles: dict[str, GraphProperties] = {
                role: inspected.of_role(role) for role in sorted(inspected.roles)
            }
            nodes = self._model.nodes(graph)
            stored = {p.role: p.dimensions for p in nodes if p.storage != Storage()}
            words = key, graph.node, graph.laplacian
            reports.append(GraphReport(*words, whole, families, roles, stored))
        return reports

    def candidate_results(self) -> list[CandidateResult]:
        """Signal and noise on each candidate graph, the best graph first."""
        results, running = [], {}
        for candidate in self.candidates:
            try:
                graph = self._built(candidate.graph, candidate.graph)
            except UnknownHeadWidthError as error:
                results.append(unmeasured_result(candidate.name, str(error)))
                continue
            statistics = statistics_on(self._model, graph, BANDS)
            if statistics is None:
                results.append(unmeasured_result(candidate.name, "joins nothing on this model"))
            else:
                running[candidate.name] = graph, statistics
        for gradients in self._gradients(self._judging, "gradients that judge graphs"):
            for _, statistics in running.values():
                statistics.observe(gradients, 1.0)
            for activity in self._activities:
                activity.observe(gradients)
        for name, (graph, statistics) in running.items():
            found = statistics.signal_to_noise()
            results.append(measured_result(name, graph.num_edges, found, graph.lambda_max))
        return ranked(results)

    def _inspected(self, graph: GraphConfig, whole: GraphConfig) -> InspectedGraph:
        built = self._built(graph, whole)
        with progress("spectrum", len(built.parameters), "parameter", True) as update:
            return InspectedGraph(
                built,
                self._model.weights(),
                self._model.layout.own,
                eigenvalues=self._eigenvalues,
                bins=BINS,
                seed=self._config.seed,
                progress=update,
            )

    def _built(self, graph: GraphConfig, whole: GraphConfig) -> ParameterGraph:
        """A graph that compares gradients as the whole one does that it is a part of."""
        if (graph, whole) not in self._made:
            parameters, gradient = self._model.nodes(graph), self._means.get(whole, no_features)
            what = "building the parameter graph"
            with progress(what, len(parameters), "parameter", True) as update:
                built = self._model.build(graph, parameters, update, gradient)
            self._made[graph, whole] = built
        return self._made[graph, whole]

    def _gradients(self, batches: Sequence[Batch], what: str) -> Iterator[Signal]:
        with progress(what, len(batches), "step", True) as update:
            for gradients in gradients_of(self._model, batches):
                yield gradients
                update(1)


def _words(edge: EdgeConfig) -> str:
    if edge.family != "similarity":
        return edge.family
    return f"similarity of {edge.features}, {edge.neighbours} neighbours within the {edge.scope}"
