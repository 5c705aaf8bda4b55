"""What a graph of activations tells of itself, in the words that graphs of edges have."""

from collections.abc import Mapping

import numpy as np

from spectral_ds.coactivation import Coactivation, Held, SubspaceOperator, largest
from spectral_ds.config import EdgeConfig, SpectralConfig
from spectral_ds.engines import Engine
from spectral_ds.graph import ParameterNodes
from spectral_ds.spectrum import Density, Eigenpairs, SignalToNoise


class ToldGraph:
    """The half of `CoactivationGraph` that takes no part in a step.

    Attributes:
        keep: R; None until it is known.
        parameters: that the graph covers, in model order.
        held: what this rank holds of the graph's parameters.
    """

    keep: Coactivation | None
    parameters: tuple[ParameterNodes, ...]
    held: Held
    _edge: EdgeConfig
    _whole: SpectralConfig
    _engine: Engine
    _operator: SubspaceOperator
    _bytes_of_function: int

    @property
    def lambda_max(self) -> float:
        """The largest eigenvalue of R of any layer."""
        return largest([] if self.keep is None else self.keep.all_spectra())

    @property
    def is_relative(self) -> bool:
        """Whether the response is one of activity in what is kept over that in what is learned."""
        return self._edge.learn != "none"

    @property
    def rank(self) -> int:
        """The most directions that are known of a layer."""
        return self._edge.rank

    @property
    def num_nodes(self) -> int:
        """Inputs of all layers; those that share their input count once."""
        found = [] if self.keep is None else self.keep.all_spectra()
        return sum(spectrum.inputs for spectrum in found)

    @property
    def num_edges(self) -> int:
        """Pairs of inputs of one layer."""
        found = [] if self.keep is None else self.keep.all_spectra()
        return sum(spectrum.inputs * (spectrum.inputs - 1) // 2 for spectrum in found)

    def operator(self, parameter: str, matrix: int = 0) -> np.ndarray:
        """R of a parameter's layer, (inputs, inputs), float64: for study of small models.

        Raises:
            ValueError: the graph has none.
        """
        spectra = [] if self.keep is None else self.keep.of(parameter)
        if matrix >= len(spectra) or (spectrum := spectra[matrix]) is None:
            raise ValueError(f"no graph of the inputs of {parameter!r}, matrix {matrix}")
        return spectrum.matrix()

    def describe(self) -> str:
        """What it is and how it filters, for people."""
        edge, whole = self._edge, self._whole
        if self.keep is None:
            return "co-activation, until calibrate() gives inputs to keep"
        spectra = self.keep.all_spectra()
        shares = [min(s.values.sum() / s.inputs, 1.0) for s in spectra]
        inputs = sorted({s.inputs for s in spectra}) or [0]
        widths = f"{inputs[0]:,}" + (f" to {inputs[-1]:,}" if len(inputs) > 1 else "")
        with_inputs = len({name for name, _ in self.held.graph_of})
        others = len(self.parameters) - with_inputs
        learn = "" if edge.learn == "none" else f", learn {edge.learn}"
        return (
            f"co-activation of {with_inputs} parameters, {len(spectra)} graphs of "
            f"{widths} inputs, whose {edge.rank} most active directions hold "
            f"{100 * float(np.mean(shares)) if shares else 0:.0f} % of the activity (keep "
            f"{edge.keep}{learn}); {others} parameters without inputs x {whole.filter.rest:g}; "
            f"filter {whole.filter.response}; {self._bytes_of_function / 2**20:.2f} MiB a step "
            f"over all ranks; scratch {self._operator.scratch_bytes / 2**20:.1f} MiB on this rank"
        )

    def eigenpairs(self, k: int) -> list[Eigenpairs]:
        """The k most active directions of each graph; the first rank has them, others none."""
        found = []
        is_first = self._engine.communicator.rank == 0
        for leader, members in self._members().items():
            for spectrum in () if self.keep is None else self.keep.spectra[leader]:
                if spectrum is not None:
                    rows = np.arange(spectrum.inputs if is_first else 0)
                    vectors = spectrum.vectors[rows, :k].astype(np.float64)
                    values = spectrum.values[:k]
                    found.append(
                        Eigenpairs(members, 1, values, rows, vectors, np.zeros(len(values)))
                    )
        return found

    def density(self, bins: int) -> Density:
        """Share of the eigenvalues in equal bins of [0, λ_max]; unknown ones lie at their mean."""
        edges = np.linspace(0, self.lambda_max, bins + 1)
        counts = np.zeros(bins)
        for spectrum in () if self.keep is None else self.keep.all_spectra():
            counts += np.histogram(spectrum.values, edges)[0]
            others = spectrum.inputs - len(spectrum.values)
            counts += others * np.histogram([spectrum.rest], edges)[0]
        return Density(counts / max(counts.sum(), 1), edges)

    def signal_to_noise(self) -> SignalToNoise:
        """It is not measured.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("signal and noise are not measured on a graph of family activations")

    def _members(self) -> Mapping[str, tuple[str, ...]]:
        """By the site that leads, the parameters of its graph."""
        found: dict[str, tuple[str, ...]] = {}
        for name, leader in ({} if self.keep is None else self.keep.leaders).items():
            found[leader] = (*found.get(leader, ()), name)
        return found
