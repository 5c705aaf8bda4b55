"""SpectralFilter: Y = (1 − s) X + s · h(L) X on the fragments of one rank."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from spectral_ds.filters.graph_function import GraphFunction
from spectral_ds.filters.rescale import NormKeeper
from spectral_ds.filters.schedule import StrengthSchedule
from spectral_ds.filters.temporal import TemporalFilter
from spectral_ds.filters.transfer import Transfer
from spectral_ds.laplacian import Shipment
from spectral_ds.sharding import Signal


class StackedFilter(Protocol):
    """A filter on one graph."""

    def apply(self, signal: Signal, strength: float) -> None:
        """Filter in place (collective)."""

    def is_identity(self, strength: float) -> bool:
        """Whether this strength leaves every signal as it is."""

    def move(self, weights: Signal, before: Signal, strength: float) -> bool:
        """Filter what weights have moved, in place, without an update in between (collective).

        Returns:
            False where that is not faster: nothing has happened then.
        """


class GraphFilter:
    """(1 − s) + s · h(L) on one graph, bucket by bucket.

    Args:
        shipments: the operators of the buckets, together as their signals travel.
        transfer: h.
        is_ready: whether the graph is known; before that, signals stay as they are.
    """

    def __init__(
        self,
        shipments: Sequence[Shipment],
        transfer: Transfer,
        is_ready: bool = True,
    ) -> None:
        self.transfer = transfer
        self.is_ready = is_ready
        self._function = GraphFunction(shipments, transfer)

    def apply(self, signal: Signal, strength: float) -> None:
        """Filter in place (collective).

        Args:
            signal: this rank's fragments, flat, any floating dtype; None counts as zeros and
                stays as it is. Arithmetic is float32.
            strength: s, equal on all ranks.
        """
        if self.is_identity(strength):
            return
        self._function.set(1 - strength, strength)
        for shipment in self._function.shipments:  # all rows come, where buckets are transposed
            for operator in shipment.carry(signal):
                self._function.evaluate(operator)

    def is_identity(self, strength: float) -> bool:
        """Whether this strength leaves every signal as it is."""
        return strength == 0 or not self.is_ready or self.transfer.is_identity

    def move(self, weights: Signal, before: Signal, strength: float) -> bool:
        """See `StackedFilter.move`."""
        return False


class SpectralFilter:
    """Everything that happens to a signal at a step: graphs one after another, then the rest.

    Args:
        graphs: gives the stacked filters, each of which takes what the one before it gave.
        schedule: s at each step.
        norms: restores the norm of each parameter after the graphs; None: norms change.
        temporal: acts last; None: no memory.
    """

    def __init__(
        self,
        graphs: Callable[[], Sequence[StackedFilter]],
        schedule: StrengthSchedule,
        norms: NormKeeper | None = None,
        temporal: TemporalFilter | None = None,
    ) -> None:
        self._graphs = graphs
        self.schedule = schedule
        self.temporal = temporal
        self._norms = norms

    def is_idle(self, step: int) -> bool:
        """Whether nothing at all happens at this step."""
        strength = self.schedule.at(step)
        return self.temporal is None and all(g.is_identity(strength) for g in self._graphs())

    def move(self, weights: Signal, before: Signal, step: int) -> bool:
        """Filter what weights have moved, if one graph alone acts, and can (collective).

        Args:
            weights: this rank's fragments, flat; None stays as it is.
            before: the same before the base optimizer's step.
            step: optimizer step, from 0, equal on all ranks.

        Returns:
            False if nothing has happened: the updates are to be filtered.
        """
        graphs = self._graphs()
        if len(graphs) > 1 or self._norms is not None or self.temporal is not None:
            return False
        return graphs[0].move(weights, before, self.schedule.at(step))

    def apply(
        self,
        signal: Signal,
        step: int,
        scale: float = 1.0,
        is_finite: torch.Tensor | None = None,
    ) -> None:
        """Filter in place (collective).

        Args:
            signal: this rank's fragments of the filtered parameters, flat, any floating dtype;
                None is a parameter without gradient: it counts as zeros and stays as it is.
            step: optimizer step, from 0, equal on all ranks.
            scale: by which the signal is multiplied (loss scaling).
            is_finite: (), bool: whether all other gradients are, on all ranks; None: yes.
        """
        if self.is_idle(step):
            return
        strength = self.schedule.at(step)
        before = None if self._norms is None else self._norms.norms(signal)
        for graph in self._graphs():
            graph.apply(signal, strength)
        if self._norms is not None and before is not None:
            self._norms.restore(signal, before)
        if self.temporal is not None:
            self.temporal.apply(signal, scale, is_finite)
