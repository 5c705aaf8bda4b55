"""What a filter and a regularizer take of one graph at a step where they act."""

from spectral_ds.filters.transfer import Transfer
from spectral_ds.laplacian import Work


def filter_work(transfer: Transfer, acts: bool) -> Work:
    """The work of (1 − s) + s · h(L): the signal comes and returns.

    Args:
        transfer: h.
        acts: whether s is ever above 0.
    """
    if transfer.is_identity or not acts:
        return Work()
    return Work(transfer.hops, transposes=2)


def penalty_work(transfer: Transfer) -> Work:
    """The work of r(L) + ρI: what weights have moved comes, and the product returns.

    Args:
        transfer: r.
    """
    return Work(transfer.hops, transposes=2)
