"""GradientSamples: what is kept of the gradient for one graph, sampled every few steps.

Sketches of its running mean are the features that similarity of gradients compares; sketches in
another projection, and their powers by frequency, are signal and noise.
"""

from collections.abc import Collection, Sequence

import torch

from spectral_ds.checkpoint import PartState, Restoration, SavedState
from spectral_ds.config import SpectralConfig
from spectral_ds.engines import Engine
from spectral_ds.geometry.buckets import bucket_elements, parameters_with_edges
from spectral_ds.graph import ParameterNodes
from spectral_ds.laplacian import ParameterGraph, plan_on_node_signals
from spectral_ds.sharding import ShardLayout, Signal
from spectral_ds.sketches import FeatureSource, Sketches, no_features
from spectral_ds.spectrum import GradientStatistics, RunningSketch, Spectrometer
from spectral_ds.stack.choices import GraphChoice, feature_width, is_adaptive, sketch_shape


class GradientSamples:
    """Samples of one engine's gradient, for one graph.

    Args:
        index: which graph of the stack it is, from 0.
        choice: what the graph is made of.
        config: all of the configuration.
        engine: whose gradients are sampled.
        layout: the fragments of all ranks.

    Attributes:
        features: running mean of the gradient that similarity compares; None if none does.
        statistics: running means of the gradient by frequency; None if nobody needs them, and
            before the first graph.
    """

    def __init__(
        self,
        index: int,
        choice: GraphChoice,
        config: SpectralConfig,
        engine: Engine,
        layout: ShardLayout,
    ) -> None:
        self.features: RunningSketch | None = None
        self.statistics: GradientStatistics | None = None
        self._index, self._config, self._engine = index, config, engine
        self._parameters = choice.parameters
        sketched = parameters_with_edges(choice.parameters, choice.families) or choice.parameters

        def sketches(width: int, longest_whole: int, seed: int) -> Sketches:
            return Sketches(
                sketched, layout, width, seed, engine.communicator, longest_whole=longest_whole
            )

        seed = config.seed
        width, shape = feature_width(choice.settings), sketch_shape(choice.settings, config)
        if width is not None:
            self.features = RunningSketch(sketches(width, 0, seed), config.statistics.decay)
            # In the projection that has chosen them, neighbours look more alike than they are.
            seed = (seed + 1) % 2**63
        self._sketches = None if shape is None else sketches(*shape, seed)

    def feature_source(self) -> FeatureSource:
        """What similarity of gradients compares now; `no_features` before the first sample."""
        running = self.features
        if running is None or not running.kept:  # samples that are not finite tell nothing
            return no_features

        def features(parameters: Sequence[ParameterNodes], sketch_width: int) -> torch.Tensor:
            return running.sketches.features(running.mean, parameters)

        return features

    def use_graph(self, graph: ParameterGraph, is_new: bool) -> Spectrometer | None:
        """Measure on a graph from now on (collective).

        Args:
            is_new: whether statistics are to forget what they measured on another graph.

        Returns:
            What measures spectra by sketches; None if there are none.
        """
        sketches, communicator = self._sketches, self._engine.communicator
        if sketches is None:
            return None
        measured = [group for group in graph.groups if group.parameters[0].name in sketches.columns]
        plan = plan_on_node_signals(
            graph.of_groups(measured),
            sketches.columns,
            sketches.layout,
            communicator,
            self._engine.everyone,
            kernel=self._config.operator.kernel,
            bucket_elements=bucket_elements(communicator.device),
        )
        spectrometer = Spectrometer(sketches, plan, communicator)
        if self.statistics is not None:
            self.statistics.use_graph(spectrometer, is_new)
            return spectrometer
        follows = self._config.filter if is_adaptive(self._config) else self._config.monitor
        self.statistics = GradientStatistics(
            sketches,
            spectrometer,
            bands=follows.bands,
            decay=self._config.statistics.decay,
            keeps_mean=self.features is None,
        )
        return spectrometer

    def is_due(self, step: int) -> bool:
        """Whether a sample is due."""
        return self.statistics is not None and step % self._config.statistics.interval == 0

    def take(
        self,
        step: int,
        gradients: Signal,
        scale: float,
        is_finite: torch.Tensor | None = None,
    ) -> None:
        """Take a sample on steps where it is due (collective).

        Args:
            scale: by which the gradients are multiplied (loss scaling).
            is_finite: (), bool: whether all other gradients are, on all ranks; None: yes.
        """
        if self.statistics is not None and self.is_due(step):
            is_finite = self.statistics.observe(gradients, scale, is_finite)
            if self.features is not None:
                self.features.add(self.features.take(gradients, scale), is_finite)

    def take_over(self, other: "GradientSamples", names: Collection[str]) -> bool:
        """Go on with what another has sampled of these parameters; whether graphs are made of it.

        Signal and noise are measured anew, as they are of all nodes together.
        """
        if self.features is None or other.features is None:
            return False
        self.features.take_over(other.features, names)
        return True

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
        state = PartState()
        if self.statistics is not None:
            state |= self.statistics.state(f"statistics.{self._index}")
        for name, running in self._running.items():
            state |= running.state(name)
        return state

    def restore(self, saved: SavedState) -> Restoration:
        """See `Part.restore`; what was sketched otherwise is left out, and begins anew."""
        restorations: list[Restoration] = []
        for name, running in self._running.items():
            statistics = self.statistics
            if statistics is not None and running is not statistics.running:
                statistics = None
            found = running.restore(name, saved)
            if found is None:
                restorations.append((statistics or running).begin_anew)
                continue
            restorations.append(found)
            if statistics is not None:
                restorations.append(statistics.restore(f"statistics.{self._index}", saved))

        def put_in_place() -> None:
            for restoration in restorations:
                restoration()

        return put_in_place

    def whole_pieces(self) -> dict[str, dict[str, int]]:
        """See `GraphPart.whole_pieces`: complete sketches."""
        return {
            name: {
                parameter.name: parameter.nodes * running.sketches.columns[parameter.name]
                for parameter in self._parameters
                if parameter.name in running.sketches.columns
            }
            for name, running in self._running.items()
        }
