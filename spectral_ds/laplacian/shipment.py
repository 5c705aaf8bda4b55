"""Shipment: buckets whose columns travel together, by one all-to-all there and one back.

Ranks wait for each other at every collective, so fewer and larger ones cost less; what is
multiplied at once stays a bucket, which the cache holds.
"""

from collections.abc import Iterator, Sequence

import torch

from spectral_ds.laplacian.buffers import SplitBuffers
from spectral_ds.laplacian.operator import LaplacianOperator
from spectral_ds.laplacian.transpose import copy, segments
from spectral_ds.sharding import Communicator, Signal


class Shipment:
    """Buckets that a signal passes through one after another.

    Args:
        operators: of the buckets: transposed ones, or one whose rows stay.
        communicator: the ranks that share the parameters.

    Attributes:
        buffers: what travels, by peer and then by bucket; None where rows stay.
    """

    def __init__(self, operators: Sequence[LaplacianOperator], communicator: Communicator) -> None:
        self.operators = operators
        self.buffers: SplitBuffers | None = None
        self._transpositions = [op.transposition for op in operators if op.transposition]
        if self._transpositions:
            self.buffers = SplitBuffers.joined(
                [t.buffers for t in self._transpositions], communicator
            )
        # The parts of the buffers that hold what a bucket sends and receives.
        self._sends: list[list[torch.Tensor]] = []
        self._receives: list[list[torch.Tensor]] = [[] for _ in operators]

    def use_buffers(self, send: torch.Tensor, receive: torch.Tensor) -> None:
        """Take flat buffers, shared with other exchanges, of at least the needed size."""
        if self.buffers is not None:
            self.buffers.use(send, receive)
            self._sends = segments(self.buffers.send, [t.sends for t in self._transpositions])
            self._receives = segments(
                self.buffers.receive, [t.receives for t in self._transpositions]
            )

    def carry(self, signal: Signal) -> Iterator[LaplacianOperator]:
        """Each operator with its part of the signal in scratch.x (collective).

        What scratch.out holds when the next one is asked for takes the place of that part.

        Args:
            signal: this rank's fragments, flat, any floating dtype; None counts as zeros and
                stays as it is.
        """
        for operator in self._pass_through(signal):
            yield operator
            operator.block.store(operator.scratch.out.owned, signal)
        for transposition, views in zip(self._transpositions, self._sends, strict=True):
            transposition.unpack(views, signal)

    def carry_difference(
        self, signal: Signal, minus: Signal | None, target: Signal, factors: Sequence[float]
    ) -> Iterator[LaplacianOperator]:
        """Each operator with its part of a difference in scratch.x (collective).

        What scratch.out holds when the next one is asked for is added to the target.

        Args:
            signal: see `carry`.
            minus: what is subtracted from it; see `LocalBlock.load`.
            target: fragments like the signal's; it may be the signal.
            factors: of what is added, one a fragment.
        """
        for operator in self._pass_through(signal, minus):
            yield operator
            operator.block.add(operator.scratch.out.owned, target, factors)
        for transposition, views in zip(self._transpositions, self._sends, strict=True):
            transposition.add(views, target, factors)

    def _pass_through(
        self, signal: Signal, minus: Signal | None = None
    ) -> Iterator[LaplacianOperator]:
        """Each operator with what has come in scratch.x; what has come returns as scratch.out."""
        for transposition, views in zip(self._transpositions, self._sends, strict=True):
            transposition.pack(signal, views, minus)
        if self.buffers is not None:
            self.buffers.exchange()
        for operator, views in zip(self.operators, self._receives, strict=True):
            x, _, out = operator.scratch
            operator.block.load(signal, x.owned, minus)
            copy(x.received, views)
            yield operator
            copy(views, out.received)
        if self.buffers is not None:
            self.buffers.give_back()
