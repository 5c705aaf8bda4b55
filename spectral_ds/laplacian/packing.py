"""Packing: how each group of joined parameters is exchanged, and which are worked on together.

In: what each rank owns of each group, and what it would send. Out: an exchange for each group, and
packs of groups. The rules alone: `laplacian.plan` follows them, `planning` foretells by them.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from spectral_ds.laplacian.transpose import column_slices
from spectral_ds.laplacian.work import Work

# What a configuration asks for, and what a group does.
ExchangeName = Literal["best", "boundary", "transpose"]
Exchange = Literal["local", "boundary", "transpose"]


# Of nodes, by rank: counted, or by chance.
Counts = npt.NDArray[np.float64]


class Packable(NamedTuple):
    """What decides with which other groups a group of joined parameters is worked on."""

    width: int  # columns of its nodes' signals
    elements: npt.NDArray[np.int64]  # that each rank owns; (world size,)
    is_path: bool  # whether it is a group of depth paths
    exchange: Exchange


def exchange_of(needed: int, away: int, work: Work, wanted: ExchangeName) -> Exchange:
    """How a group's rows come to their neighbours.

    Args:
        needed: elements that ranks need of each other in a hop.
        away: elements that leave their rank when the group is transposed.
        work: what is to be done at a step.
        wanted: what the configuration asks for.
    """
    if needed == 0:
        return "local"
    is_cheaper = work.hops is None or work.transposes * away < work.hops * needed
    if wanted == "transpose" or (wanted == "best" and is_cheaper):
        return "transpose"
    return "boundary"


def count_exchanges(exchanges: Sequence[Exchange]) -> dict[Exchange, int]:
    """How many groups are exchanged in each way."""
    ways: tuple[Exchange, ...] = get_args(Exchange)
    return {way: exchanges.count(way) for way in ways}


def packs_of(groups: Sequence[Packable], bucket_elements: int) -> list[list[int]]:
    """Groups of equal width and exchange, together while they fit; groups of depth paths alone.

    Args:
        bucket_elements: the most that a rank may own of a pack of more than one group.

    Returns:
        The positions of each pack's groups.
    """
    packs: list[list[int]] = []
    still_open: dict[object, tuple[list[int], npt.NDArray[np.int64]]] = {}
    for position, (width, elements, is_path, exchange) in enumerate(groups):
        slices = column_slices(elements, width) if exchange == "transpose" else None
        key = position if is_path else (width, exchange, slices)
        held, filled = still_open.get(key, ([], np.zeros_like(elements)))
        if not held or (filled + elements).max() > bucket_elements:
            held, filled = [], np.zeros_like(elements)
            packs.append(held)
        held.append(position)
        still_open[key] = held, filled + elements
    return packs


def shipments_of(elements: Sequence[int | None], most: int) -> list[list[int]]:
    """Buckets that are transposed together while they fit; those whose rows stay alone.

    Args:
        elements: of each bucket, of the rank that owns most of it; None: its rows stay.
        most: elements of a shipment of more than one bucket.

    Returns:
        The positions of each shipment's buckets.
    """
    shipments: list[list[int]] = []
    held: list[int] = []
    filled = 0
    for position, size in enumerate(elements):
        if size is None:
            shipments.append([position])
            continue
        if not held or filled + size > most:
            held, filled = [], 0
            shipments.append(held)
        held.append(position)
        filled += size
    return shipments


def nodes_in_scratch(own: Counts, boundary: Counts) -> Counts:
    """As many nodes without a boundary as would take the scratch memory that these take.

    Of own rows alone there are three matrices, and buffers of as much as two at most. Boundary rows
    lie in two of the matrices, and pass through both buffers.

    Args:
        own, boundary: rows that a rank stores, or (world size,).
    """
    return np.maximum(own, np.ceil((3 * own + 4 * boundary) / 5))
