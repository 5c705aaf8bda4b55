"""CoactivationGraph: one graph of the stack that is made of activations, and what acts by it.

`StackedGraph` has the same methods for graphs that edges make.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from spectral_ds.checkpoint import PartState, Restoration, SavedState
from spectral_ds.coactivation import (
    Batch,
    Coactivation,
    CoactivationFilter,
    CoactivationPenalty,
    Energy,
    Factors,
    Function,
    Held,
    Key,
    Projections,
    Response,
    Spectrum,
    SubspaceOperator,
    calibrate,
    called_with_tokens,
    function_of,
    responses_within,
)
from spectral_ds.coactivation import file as statistics
from spectral_ds.config import SpectralConfig, SpectralConfigError
from spectral_ds.console.progress import progress
from spectral_ds.engines import Engine
from spectral_ds.graph import Edges
from spectral_ds.sharding import ShardLayout, Signal
from spectral_ds.stack.activations import graphs_of, sites_of_graph
from spectral_ds.stack.choices import GraphChoice
from spectral_ds.stack.coactivation_state import restored, sizes_of, state_of
from spectral_ds.stack.contents import Contents
from spectral_ds.stack.learning import Learning
from spectral_ds.stack.names import listed
from spectral_ds.stack.responses import choose_transfers
from spectral_ds.stack.told_graph import ToldGraph

KEPT, LEARNED, CONTENTS = "keep", "learn", "contents"


class CoactivationGraph(ToldGraph):
    """The co-activation graphs of a model's layers. Made and rebuilt collectively.

    Args:
        index: which graph of the stack it is, from 0.
        choice: what the graph covers.
        whole: all of the configuration.
        engine: whose updates or gradients are filtered.
        layout: the fragments of all ranks.
        previous: the same of a stack that this one replaces; None: there is none.
        kept: the parameters of both, in an order equal on all ranks.

    Attributes:
        parameters: that the graph covers, in model order.
        keep: R: of the inputs that the model is to keep; None until it is known.
        learn: T: of those that it is to learn; None for I, and until it is known.
        held: what this rank holds of them.
        filter: (1 − s) + s · G.
        penalty: r(R) + ρI of the regularizer; None without one, and until R is known.
    """

    filter: CoactivationFilter
    penalty: CoactivationPenalty | None = None

    def __init__(
        self,
        index: int,
        choice: GraphChoice,
        whole: SpectralConfig,
        engine: Engine,
        layout: ShardLayout,
        previous: "CoactivationGraph | None" = None,
        kept: Sequence[str] = (),
    ) -> None:
        self._index, self._choice, self._whole = index, choice, whole
        self._engine, self._layout = engine, layout
        self._edge = choice.settings.edges[0]
        self.parameters = choice.parameters
        self._refuse_copies()
        self._ridge = whole.regularizer.ridge if index == 0 else 0.0
        self._sites = sites_of_graph(engine, choice.parameters)
        modules = (module for site in self._sites for module in site.modules)
        self._called = called_with_tokens(engine.module, modules)
        self._projections = Projections(self._edge.rank, whole.seed, engine.everyone.device)
        self._contents: Contents = Contents(
            self._edge,
            f"spectral_ds.{choice.key}.edges[0]",
            engine.everyone,
            None if previous is None else previous._contents,
        )
        self._learning: Learning | None = None
        self.keep: Coactivation | None = None
        self.learn: Coactivation | None = None
        width = self._edge.rank * (1 if self._edge.learn == "none" else 2)
        with_inputs = {site.parameter for site in self._sites}
        self._operator = SubspaceOperator(
            [p for p in choice.parameters if p.name in with_inputs],
            layout,
            engine.communicator,
            min(width, max((site.inputs for site in self._sites), default=1)),
        )
        sent = torch.tensor([self._operator.bytes_sent], device=engine.communicator.device)
        self._bytes_of_function = int(engine.communicator.sum_(sent).item())
        self._warn_of_gradients()
        self._make(previous, kept)

    # Making

    def _refuse_copies(self) -> None:
        if self._edge.learn == "training" and self._engine.calls_copies:
            raise SpectralConfigError(
                f'spectral_ds.{self._choice.key}.edges[0].learn = "training": nn.DataParallel '
                "calls copies of the model in threads, whose inputs are not counted; start with "
                "torchrun, for DistributedDataParallel, or name a file of texts"
            )

    def is_due(self, step: int) -> bool:
        """Whether the graph is to be rebuilt at this step."""
        every = self._choice.settings.refresh_interval
        return every > 0 and step > 0 and step % every == 0

    def build(self) -> None:
        """Look at the activations of the present model (collective).

        Raises:
            SpectralConfigError: they cannot be had; on all ranks.
        """
        self._make()

    def _make(self, previous: "CoactivationGraph | None" = None, kept: Sequence[str] = ()) -> None:
        edge = self._edge
        known = (None, None) if previous is None else (previous.keep, previous.learn)
        keep, learn = (None if graphs is None else graphs.among(kept) for graphs in known)
        if edge.keep != "given":
            self.keep = self._of_source(KEPT, edge.keep, keep)
        elif previous is not None:
            self.keep = keep
        if edge.learn == "training":
            if learn is None or not learn.leaders:  # what is known is used until there is more
                self._watch()
            else:
                self.learn = learn
        elif edge.learn != "none":
            self.learn = self._of_source(LEARNED, edge.learn, learn)
        self._use()

    def _watch(self) -> None:
        """Look at what the model is trained with, from now on."""
        if self._learning is None:
            leaders = None if self.keep is None else self.keep.leaders
            self._learning = Learning(
                self._engine, self._called, self._sites, self._edge, self._projections, leaders
            )

    def _of_source(self, what: str, source: str, known: Coactivation | None) -> Coactivation:
        """The graphs of some inputs; of what is known already, as it is."""
        known, engine = known or Coactivation(), self._engine
        missing = [site for site in self._sites if site.parameter not in known.leaders]
        if not missing:
            return known
        self._contents.read(what)
        key = f"spectral_ds.{self._choice.key}.edges[0].{what}"
        found = graphs_of(
            source, key, self._edge, missing, self._called, engine.everyone, self._whole.seed
        )
        return known | found

    def calibrate(self, batches: Sequence[Batch]) -> None:
        """Keep what the model knows of these inputs from now on (collective)."""
        engine, shown = self._engine, self._engine.everyone.rank == 0
        with progress("looking at activations", len(batches), "call", shown) as update:
            self.keep = calibrate(
                engine.module,
                self._sites,
                batches,
                self._edge.rank,
                self._whole.seed,
                engine.everyone,
                update,
            )
        self._use()

    def save(self, path: Path) -> None:
        """Write what is to be kept into a file; see `coactivation.file`.

        Raises:
            OSError: it cannot be written.
            ValueError: nothing is known yet.
        """
        if self.keep is None:
            raise ValueError("nothing is known yet of what is to be kept: call calibrate() first")
        statistics.save(path, self.keep, self._edge.keep, self._edge.rank)

    def begin_step(self, step: int) -> None:
        """Use what is learned once it is known (collective until then)."""
        found = None if self._learning is None else self._learning.at_step(step)
        if found is not None:
            self._learning, self.learn = None, found
            self._use()
            self._engine.log(f"what is learned is known: filtered from step {step} on")

    def forget(self) -> None:
        """Take back the hooks on the model."""
        if self._learning is not None:
            self._learning.stop()
            self._learning = None

    def warn_of_end(self) -> None:
        """Warn if training ends while the filter waits for what is to be learned."""
        if self._learning is not None and self.learn is None:
            self._learning.warn_of_end()

    # Acting

    @property
    def is_ready(self) -> bool:
        """Whether all is known that the filter needs."""
        return self.keep is not None and (self._edge.learn == "none" or self.learn is not None)

    def _use(self) -> None:
        """Make what acts (no communication)."""
        keep = self.keep or Coactivation()
        top = self.lambda_max
        graph_of = {}
        for site in self._sites:
            spectra = keep.of(site.parameter)
            for matrix, spectrum in enumerate(spectra):
                if spectrum is not None:
                    leader = keep.leaders[site.parameter]
                    graph_of[site.parameter, matrix] = leader, matrix
        covered = {parameter.name for parameter in self.parameters}
        known = {name for name, _ in graph_of}
        others = [
            index
            for index, fragment in enumerate(self._engine.fragments)
            if fragment.parameter in covered - known
        ]
        device = self._engine.communicator.device
        self.held = Held(self._operator, graph_of, others, device)
        transfers = choose_transfers(self._whole, top, False, device, is_exact=True)
        spectra_here = {
            key: spectrum
            for key in self.held.graphs()
            if (spectrum := keep.of(key[0])[key[1]]) is not None
        }
        # What the monitor projects on.
        nothing = torch.empty(0, dtype=torch.float32, device=device)
        self._directions = {
            key: Factors(0.0, self.held.directions_of(key, spectrum), nothing)
            for key, spectrum in spectra_here.items()
        }
        response = responses_within(transfers.filter, top)
        functions = {}
        if self.is_ready and not transfers.filter.is_identity:
            functions = {
                key: self._function(response, key, spectrum)
                for key, spectrum in spectra_here.items()
            }
        rest = self._whole.filter.rest
        self.filter = CoactivationFilter(
            self.held, functions, transfers.filter, rest, self.is_ready
        )
        self.penalty = None
        if transfers.penalty is not None and self.keep is not None:
            of_penalty = responses_within(transfers.penalty, top)
            self.penalty = CoactivationPenalty(
                self.held, spectra_here, of_penalty, transfers.penalty, self._ridge
            )
        if functions:
            self._warn_of_growth(float(abs(response(np.array([top]))[0])), top)
        if self.keep is not None:
            self._warn_of_unseen(known)

    def _function(self, response: Response, key: Key, keep: Spectrum) -> Function:
        """G of a graph."""
        learn = self._learned(key)
        found = function_of(response, keep, learn)
        if learn is None:
            return Function.of(found, self.held.directions_of(key, keep))
        return Function.of(found, self.held.on_device(found.basis))

    def _learned(self, key: tuple[str, int]) -> Spectrum | None:
        """T of a graph; what was never trained with counts as learned like anything."""
        if self.learn is None:
            return None
        spectra = self.learn.of(key[0])
        found = spectra[key[1]] if spectra else None
        if found is None:
            site = next(site for site in self._sites if site.parameter == key[0])
            found = Spectrum(np.ones(1), np.eye(site.inputs, 1, dtype=np.float32), 1.0)
        return found

    def _warn_of_growth(self, gain: float, frequency: float) -> None:
        """Some responses stay within 1 on [0, 2] alone, where all of a Laplacian's are."""
        if gain > 1:
            self._warn(
                f"filter.response = {self._whole.filter.response}: updates along the most active "
                f"direction, of frequency {frequency:.4g}, are multiplied by {gain:.4g}; tikhonov "
                "and heat never let them grow"
            )

    def _warn_of_unseen(self, known: Collection[str]) -> None:
        unseen = [site.parameter for site in self._sites if site.parameter not in known]
        if unseen:
            self._warn(
                f"no finite activation has entered {listed(unseen)}: they count as parameters "
                "without inputs"
            )

    def _warn_of_gradients(self) -> None:
        settings, name = self._whole.filter, type(self._engine.optimizer).__name__
        acts = settings.strength > 0 and (settings.response != "identity" or settings.rest != 1)
        if settings.apply_to == "gradient" and acts and "adam" in name.lower():
            self._warn(
                f"filter.apply_to = gradient: {name} divides by the root of the gradients' squares "
                "and so takes back most of what a filter by activity does (arXiv 2604.22407); "
                "use apply_to: update"
            )

    def _warn(self, message: str) -> None:
        self._engine.log(f"spectral_ds.{self._choice.key}: {message}", logging.WARNING)

    def samples_at(self, step: int) -> bool:
        """Whether it samples the gradient at this step: never."""
        return False

    def sample(
        self, step: int, gradients: Signal, scale: float, is_finite: torch.Tensor | None
    ) -> None:
        """It samples no gradients."""

    def take_over(self, other: object, names: Collection[str]) -> None:
        """It was made with what the other knows."""

    @property
    def graph(self) -> "CoactivationGraph":
        """Itself: it has `num_nodes`, `num_edges` and `describe`, as `ParameterGraph` has."""
        return self

    def energies(self, signal: Signal) -> dict[Key, Energy]:
        """The energy of a signal along active directions of R; see `SubspaceOperator.measure`."""
        return self.held.operator.measure(signal, None, self.held.factors_of(self._directions))

    def bytes_sent(self, strength: float) -> int:
        """Bytes that all ranks together send in one step at this strength of the filter."""
        acts = not self.filter.is_identity(strength) and not self.filter.transfer.is_identity
        return self._bytes_of_function * (int(acts) + int(self.penalty is not None))

    # Checkpoints

    @property
    def digest(self) -> str:
        """SHA-256 of the graph's configuration and of the files that it names, hexadecimal."""
        settings = {**asdict(self._choice.settings), "seed": self._whole.seed}
        settings["edges"] = [self._contents.settings()]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def most_edges(self) -> int:
        """It has no edges in a state."""
        return 0

    def changed_inputs(self, saved: SavedState) -> str:
        """See `GraphPart.changed_inputs`."""
        return self._contents.difference(saved, self._name(CONTENTS))

    def state(self) -> PartState:
        """See `Part.state`."""
        state = PartState({self._name(CONTENTS): self._contents.tensor()}, edges=Edges.empty())
        for name, graphs in self._parts().items():
            state |= state_of(name, graphs, self._sites, self._edge.rank, self._engine.communicator)
        return state

    def restore(self, saved: SavedState) -> Restoration:
        """See `Part.restore`."""
        found = {
            name: restored(name, saved, self._sites, self._edge.rank) for name in self._parts()
        }

        def put_in_place() -> None:
            self.keep = found[self._name(KEPT)]
            self.learn = found.get(self._name(LEARNED))
            self.forget()  # what has been counted is of another moment
            if self.learn is None and self._edge.learn == "training":
                self._watch()
            self._use()

        return put_in_place

    def whole_pieces(self) -> dict[str, dict[str, int]]:
        """See `GraphPart.whole_pieces`."""
        sizes = dict(sizes_of(self._sites, self._edge.rank))
        return dict.fromkeys(self._parts(), sizes)

    def _parts(self) -> dict[str, Coactivation | None]:
        """What is saved, by name."""
        parts = {self._name(KEPT): self.keep}
        return parts if self._edge.learn == "none" else {**parts, self._name(LEARNED): self.learn}

    def _name(self, what: str) -> str:
        return f"coactivation.{self._index}.{what}"
