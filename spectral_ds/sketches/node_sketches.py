"""Sketches: a few random projections of every node's signal, in place of the signal.

A rank projects what it owns; what it knows of a node for which another rank answers goes to that
rank. Projections are linear: the sketch of a mean is the mean of the sketches.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from spectral_ds.geometry.buckets import Bucket
from spectral_ds.geometry.owners import RowOwners, runs_of
from spectral_ds.geometry.rectangles import Rectangle
from spectral_ds.graph import ParameterNodes
from spectral_ds.sharding import Communicator, Fragment, ShardLayout, Signal
from spectral_ds.sketches.features import add_sketch
from spectral_ds.sketches.projection import gaussian_projection, sketch_size


@dataclass(frozen=True)
class _Span:
    """Nodes [first, last) of one parameter, of which one fragment holds a part."""

    parameter: int
    first: int
    last: int
    rectangles: tuple[Rectangle, ...]


class Sketches:
    """Takes the sketches of a sharded signal, in flat buffers of fixed layout.

    A partial sketch is what one rank's elements contribute, for every node of which it owns a
    part. Complete sketches are (nodes × sketch) matrices, each row on the node's primary rank.

    Args:
        parameters: what to sketch, equal on all ranks.
        layout: the fragments of all ranks.
        sketch_width: of the projections; shorter signals, or all if it is 0, stay whole.
        seed: of the projections.
        communicator: the ranks that share the parameters.
        longest_whole: signals up to this length stay whole, too.

    Attributes:
        columns: length of a node's sketch, by parameter.
        layout: fragments of the complete sketches.
    """

    def __init__(
        self,
        parameters: Sequence[ParameterNodes],
        layout: ShardLayout,
        sketch_width: int,
        seed: int,
        communicator: Communicator,
        longest_whole: int = 0,
    ) -> None:
        self.columns = {
            p.name: sketch_size(p.width, sketch_width, longest_whole) for p in parameters
        }
        self._parameters = tuple(parameters)
        self._communicator = communicator
        self._projections: dict[int, torch.Tensor | None] = {}
        for parameter in parameters:
            width = parameter.width
            if width not in self._projections:
                is_whole = self.columns[parameter.name] == width
                projection = None if is_whole else gaussian_projection(width, sketch_width, seed)
                if projection is not None:
                    projection = projection.float().to(communicator.device)
                self._projections[width] = projection
        self._spans = self._spans_of(layout)
        buckets = [Bucket.of([parameter]) for parameter in parameters]
        owners = [RowOwners.of(bucket, layout) for bucket in buckets]
        primary = [each.primary(np.arange(each.bucket.nodes)) for each in owners]
        self.layout = self._complete_layout(primary, layout)
        # By rank: (span, first node, last node, primary rank) of each run of its spans.
        self._runs = [
            [
                (index, first, last, rank)
                for index, span in enumerate(spans)
                for first, last, rank in _runs_between(primary[span.parameter], span)
            ]
            for spans in self._spans
        ]
        self._incoming = self._arriving()
        self._taken = self.empty()

    def _spans_of(self, layout: ShardLayout) -> list[list[_Span]]:
        """The spans of every rank, parameter by parameter."""
        spans: list[list[_Span]] = [[] for _ in layout.fragments]
        for position, parameter in enumerate(self._parameters):
            of_ranks = Bucket.of([parameter]).rectangles_of_ranks(layout)
            for held_by_rank, rectangles in zip(spans, of_ranks, strict=True):
                for _, parts in groupby(rectangles, key=lambda part: part.fragment):
                    held = tuple(parts)
                    first = min(part.node for part in held)
                    last = max(part.node + part.nodes for part in held)
                    held_by_rank.append(_Span(position, first, last, held))
        return spans

    def _complete_layout(
        self, primary: Sequence[npt.NDArray[np.int64]], layout: ShardLayout
    ) -> ShardLayout:
        fragments: list[list[Fragment]] = [[] for _ in layout.fragments]
        for parameter, ranks in zip(self._parameters, primary, strict=True):
            columns = self.columns[parameter.name]
            for first, last, rank in runs_of(ranks):
                run = Fragment(parameter.name, first * columns, (last - first) * columns)
                fragments[rank].append(run)
        return ShardLayout(tuple(map(tuple, fragments)), layout.rank)

    def _size(self, span: _Span) -> int:
        return (span.last - span.first) * self.columns[self._parameters[span.parameter].name]

    @property
    def own_spans(self) -> list[_Span]:
        return self._spans[self._communicator.rank]

    def empty(self) -> torch.Tensor:
        """A flat buffer for this rank's partial sketches, float32, zeros."""
        return torch.zeros(
            sum(map(self._size, self.own_spans)),
            dtype=torch.float32,
            device=self._communicator.device,
        )

    def take(self, signal: Signal) -> torch.Tensor:
        """This rank's partial sketches of a signal, in memory that the next call reuses.

        No communication.

        Args:
            signal: this rank's fragments, flat, any floating dtype; None counts as zeros.
        """
        out = self._taken.zero_()
        for span, rows in zip(self.own_spans, self._views(out), strict=True):
            projection = self._projections[self._parameters[span.parameter].width]
            for part in span.rectangles:
                fragment = signal[part.fragment]
                if fragment is not None:
                    values = part.view(fragment).to(out.device, torch.float32)
                    first = part.node - span.first
                    add_sketch(rows[first : first + part.nodes], values, part.column, projection)
        return out

    def _views(self, partial: torch.Tensor) -> Iterator[torch.Tensor]:
        """(nodes, sketch) views of a flat buffer of partial sketches, span by span."""
        start = 0
        for span in self.own_spans:
            size = self._size(span)
            yield partial[start : start + size].view(span.last - span.first, -1)
            start += size

    def parts_of(self, partial: torch.Tensor) -> dict[Fragment, torch.Tensor]:
        """The (nodes, sketch) views of a flat buffer of partial sketches, by the run of nodes."""
        spans = [
            Fragment(self._parameters[span.parameter].name, span.first, span.last - span.first)
            for span in self.own_spans
        ]
        return dict(zip(spans, self._views(partial), strict=True))

    def complete(self, partial: torch.Tensor) -> list[torch.Tensor]:
        """Complete sketches as fragments of `self.layout` (collective, one all-to-all)."""
        rank, world_size = self._communicator.rank, self._communicator.world_size
        views = list(self._views(partial))
        outgoing: list[list[torch.Tensor]] = [[] for _ in range(world_size)]
        own = []
        for index, first, last, owner in self._runs[rank]:
            span = self.own_spans[index]
            rows = views[index][first - span.first : last - span.first].reshape(-1)
            outgoing[owner].append(rows)
            if owner == rank:
                own.append(rows)
        complete = partial.new_zeros(sum(fragment.length for fragment in self.layout.own))
        if world_size == 1:
            received = [torch.cat([*own, partial.new_empty(0)])]
        else:
            splits = [sum(length for _, length in runs) for runs in self._incoming]
            parts = [rows for to_rank in outgoing for rows in to_rank]
            buffer = partial.new_empty(sum(splits))
            dist.all_to_all_single(
                buffer,
                torch.cat([*parts, partial.new_empty(0)]),
                splits,
                [sum(rows.numel() for rows in to_rank) for to_rank in outgoing],
                group=self._communicator.group,
            )
            received = list(buffer.split(splits))
        for values, runs in zip(received, self._incoming, strict=True):
            start = 0
            for offset, length in runs:
                complete[offset : offset + length] += values[start : start + length]
                start += length
        lengths = [fragment.length for fragment in self.layout.own]
        return list(complete.split(lengths)) if lengths else []

    def _arriving(self) -> list[list[tuple[int, int]]]:
        """By peer: (offset in the flat complete sketches, length) of each run that comes."""
        starts: dict[str, list[tuple[int, int]]] = defaultdict(list)
        offset = 0
        for fragment in self.layout.own:
            starts[fragment.parameter].append((fragment.start, offset))
            offset += fragment.length
        found: list[list[tuple[int, int]]] = [[] for _ in self._runs]
        for peer, runs in enumerate(self._runs):
            for index, first, last, owner in runs:
                if owner == self._communicator.rank:
                    name = self._parameters[self._spans[peer][index].parameter].name
                    columns = self.columns[name]
                    begin = first * columns
                    start, at = max(pair for pair in starts[name] if pair[0] <= begin)
                    found[peer].append((at + begin - start, (last - first) * columns))
        return found

    def partial(self, complete: Sequence[torch.Tensor]) -> torch.Tensor:
        """Partial sketches that `complete` turns into these; no communication."""
        found = self.empty()
        views = list(self._views(found))
        offset_of: dict[str, list[tuple[int, torch.Tensor]]] = defaultdict(list)
        for fragment, values in zip(self.layout.own, complete, strict=True):
            offset_of[fragment.parameter].append((fragment.start, values))
        for index, first, last, owner in self._runs[self._communicator.rank]:
            if owner == self._communicator.rank:
                span = self.own_spans[index]
                parameter = self._parameters[span.parameter].name
                columns = self.columns[parameter]
                held = [pair for pair in offset_of[parameter] if pair[0] <= first * columns]
                start, values = max(held, key=lambda pair: pair[0])
                part = values[first * columns - start : last * columns - start]
                views[index][first - span.first : last - span.first] = part.view(-1, columns)
        return found

    def features(self, partial: torch.Tensor, parameters: Sequence[ParameterNodes]) -> torch.Tensor:
        """Complete sketches of all nodes of some parameters, on every rank; one all-reduce.

        Returns:
            (nodes, sketch), float64.
        """
        bucket = Bucket.of(parameters)
        first_of = {p.name: int(bucket.first_node[i]) for i, p in enumerate(parameters)}
        shape = bucket.nodes, self.columns[parameters[0].name]
        found = torch.zeros(shape, dtype=torch.float64, device=partial.device)
        for span, rows in zip(self.own_spans, self._views(partial), strict=True):
            first = first_of.get(self._parameters[span.parameter].name)
            if first is not None:
                found[first + span.first : first + span.last] += rows
        return self._communicator.sum_(found)


def _runs_between(primary: npt.NDArray[np.int64], span: _Span) -> Iterator[tuple[int, int, int]]:
    """(first, last, primary rank) of the runs of a span's nodes."""
    for first, last, rank in runs_of(primary[span.first : span.last]):
        yield span.first + first, span.first + last, rank
