"""What is measured on a graph of activations: how much of a step goes along active directions."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from spectral_ds.engines import Engine
from spectral_ds.sharding import Signal
from spectral_ds.stack import CoactivationGraph


class CoactivationMeasurement:
    """Measures signals on the co-activation graphs of a model's layers.

    Args:
        engine: of the plugin.
        graph: what is measured on.
    """

    def __init__(self, engine: Engine, graph: CoactivationGraph) -> None:
        self._engine, self._graph = engine, graph

    def shares(self, signal: Signal, bands: int) -> npt.NDArray[np.float64]:
        """Shares of a signal's energy by activity, least active directions first (collective).

        The last band is the most active direction of each layer, those before it the next 1, 2, 4
        and so on, and the first all that is left.
        """
        directions, total = self.energies(signal)
        edges = [min(2**power, len(directions)) for power in range(bands - 1)]
        edges = [0, *edges]
        held = [directions[low:high].sum() for low, high in pairwise(edges)]
        shares = np.array([max(total - sum(held), 0.0), *reversed(held)])
        return shares / total if total > 0 else shares

    def energies(self, signal: Signal) -> tuple[npt.NDArray[np.float64], float]:
        """Energy along the i-th most active direction of all layers, and in all (collective)."""
        graph, communicator = self._graph, self._engine.communicator
        found = graph.energies(signal)
        ranks = graph.rank
        own = torch.zeros(ranks + 1, dtype=torch.float64, device=communicator.device)
        for energy in found.values():
            own[: len(energy.directions)] += energy.directions
            own[-1] += energy.total
        summed = communicator.sum_(own).cpu().numpy()
        return summed[:-1], float(summed[-1])

    def before_rebuild(self, step: int) -> None:
        """Nothing is judged."""

    def metrics(self, step: int) -> dict[str, float]:
        """Nothing more is known."""
        return {}
