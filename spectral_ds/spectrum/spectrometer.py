"""Spectrometer: measures spectra of sharded signals on one graph, by sketches of nodes' signals.

Random projections keep inner products on average, and with them every moment ⟨X, T_j(L̃) X⟩: a few
columns tell the spectrum of many, up to sampling error, and wherever in a signal its energy lies.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.laplacian import OperatorPlan
from spectral_ds.sharding import Communicator, Signal
from spectral_ds.sketches.node_sketches import Sketches
from spectral_ds.spectrum.moments import chebyshev_moments
from spectral_ds.spectrum.roughness import roughness


class Spectrometer:
    """Measures signals on one graph.

    Args:
        sketches: how sketches are taken; None to measure whole signals.
        plan: the graph's operators on complete sketches, or on the signals.
        communicator: the ranks that share the parameters.
    """

    def __init__(
        self,
        sketches: Sketches | None,
        plan: OperatorPlan,
        communicator: Communicator,
    ) -> None:
        self.plan = plan
        self._sketches = sketches
        self._communicator = communicator

    def moments(self, signal: Signal, count: int) -> torch.Tensor:
        """Chebyshev moments; see `chebyshev_moments` (collective).

        Args:
            signal: this rank's fragments, flat, any floating dtype; None counts as zeros.
        """
        return self._moments(self._measured(signal), count)

    def moments_of_sketches(self, partial: torch.Tensor, count: int) -> torch.Tensor:
        """Chebyshev moments of what `Sketches.take` has found (collective)."""
        assert self._sketches is not None, "they were taken"
        return self._moments(self._sketches.complete(partial), count)

    def roughness(self, signal: Signal, names: Sequence[str]) -> npt.NDArray[np.float64]:
        """⟨X, L X⟩ / (λ_max ‖X‖²) of each parameter; see `roughness` (collective)."""
        measured = self._measured(signal)
        return roughness(self.plan.operators, measured, names, self._communicator)

    def _measured(self, signal: Signal) -> Signal:
        sketches = self._sketches
        return signal if sketches is None else sketches.complete(sketches.take(signal))

    def _moments(self, measured: Signal, count: int) -> torch.Tensor:
        return chebyshev_moments(self.plan.operators, measured, count, self._communicator)
