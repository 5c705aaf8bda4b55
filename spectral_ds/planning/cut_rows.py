"""Rows of matrices that shard boundaries cut: who holds parts of them, and what is sent for them.

The rules are those of `coactivation.operator` and `coactivation.cut_rows`, worked out for all ranks
at once. Parameters of equal shape that are cut alike are worked out once.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spectral_ds.coactivation import Piece, answering_rank, pieces_of
from spectral_ds.graph import ParameterNodes
from spectral_ds.planning.flows import Cluster, Floats, Flow
from spectral_ds.planning.layouts import Cuts, Ints
from spectral_ds.sharding import Fragment


@dataclass(frozen=True, eq=False)
class CutParameter:
    """What each rank has of one parameter.

    Attributes:
        rank, row: (rows,): a rank, and the number of a cut row that it has a part of, counted over
            the parameter's matrices; each pair once, sorted by row.
        rows_at_once: by rank, the most whole rows that are filtered together.
        largest: by rank, the most elements that are.
    """

    rank: Ints
    row: Ints
    rows_at_once: Floats
    largest: Floats


@dataclass(frozen=True, eq=False)
class CutMatrices:
    """What all ranks have of the matrices of a graph.

    Attributes:
        rows: cut rows that each rank has a part of; (world size,).
        flow: rows that travel when each function is evaluated: to the rank that adds them up, and
            back.
        sent: the same by parameter.
        rows_at_once, largest: see `CutParameter`.
    """

    rows: Floats
    flow: Flow
    sent: Mapping[str, int]
    rows_at_once: Floats
    largest: Floats


def cut_matrices(
    parameters: Sequence[ParameterNodes],
    cuts: Mapping[str, Cuts],
    cluster: Cluster,
    bucket_elements: int,
) -> CutMatrices:
    """What all ranks have of some parameters, whose nodes are columns."""
    known: dict[Hashable, CutParameter] = {}
    # As `CutRows` numbers them, so that the same ranks answer.
    number, holder, position = [], [], []
    start = 0
    rows, largest = np.zeros(cluster.world_size), np.zeros(cluster.world_size)
    ordered = sorted(parameters, key=lambda parameter: parameter.name)
    for index, parameter in enumerate(ordered):
        cut = cuts[parameter.name]
        key = parameter.shape, parameter.storage, cut
        if key not in known:
            known[key] = _cut(parameter, cut, cluster, bucket_elements)
        found, outputs = known[key], parameter.width
        rows = np.maximum(rows, found.rows_at_once)
        largest = np.maximum(largest, found.largest)
        matrices, matrix = np.unique(found.row // outputs, return_inverse=True)
        number.append(start + matrix * outputs + found.row % outputs)
        holder.append(found.rank)
        position.append(np.full(len(found.row), index))
        start += len(matrices) * outputs
    numbers, holders, owners = map(_joined, (number, holder, position))
    order = np.lexsort((holders, numbers))
    numbers, holders, owners = numbers[order], holders[order], owners[order]
    answering = answering_rank(numbers, holders)
    moves = (answering >= 0) & (answering != holders)
    one, other = holders[moves], answering[moves]
    both = np.concatenate((one, other)), np.concatenate((other, one))
    by_parameter = 2 * np.bincount(owners[moves], minlength=len(ordered))
    return CutMatrices(
        cluster.by_rank(holders, np.ones(len(holders))),
        Flow.of_pairs(*both, np.ones(2 * len(one)), cluster),
        {p.name: int(count) for p, count in zip(ordered, by_parameter, strict=True)},
        rows,
        largest,
    )


def _cut(
    parameter: ParameterNodes, cut: Cuts, cluster: Cluster, bucket_elements: int
) -> CutParameter:
    rows, largest = np.zeros(cluster.world_size), np.zeros(cluster.world_size)
    found = [np.zeros((0, 2), np.int64)]
    for rank, start, end in zip(cut.rank, cut.bounds[:-1], cut.bounds[1:], strict=True):
        fragment = Fragment(parameter.name, int(start), int(end - start))
        for piece in pieces_of([parameter], [fragment]):
            largest[rank] = max(largest[rank], piece.elements_at_once(bucket_elements))
            if piece.is_whole:
                rows[rank] = max(rows[rank], piece.rows_at_once(bucket_elements))
            else:
                found.append(_rows(parameter, piece, int(rank)))
    pairs = np.unique(np.concatenate(found), axis=0)
    return CutParameter(pairs[:, 1], pairs[:, 0], rows, largest)


def _rows(parameter: ParameterNodes, piece: Piece, rank: int) -> Ints:
    """(rows, 2): numbers of the rows of a part, and its rank."""
    first = piece.key[1] * parameter.width
    rows = first + np.arange(piece.outputs.start, piece.outputs.stop)
    return np.stack((rows, np.full_like(rows, rank)), axis=1)


def _joined(parts: Sequence[Ints]) -> Ints:
    return np.concatenate([np.zeros(0, np.int64), *parts])
