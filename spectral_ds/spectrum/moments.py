"""Chebyshev moments μ_j = ⟨X, T_j(L̃) X⟩ of a sharded signal.

Source: Weiße et al., "The kernel polynomial method", Rev. Mod. Phys. 78, 275 (2006),
eqs. 34 and 35: each hop gives two moments.
"""

from collections.abc import Sequence

import torch

from spectral_ds.laplacian import LaplacianOperator
from spectral_ds.sharding import Communicator, Signal, squared_norm_of


def chebyshev_moments(
    operators: Sequence[LaplacianOperator],
    signal: Signal,
    count: int,
    communicator: Communicator,
) -> torch.Tensor:
    """The first `count` moments, summed over all buckets, columns and ranks (collective).

    Args:
        operators: one a bucket.
        signal: this rank's fragments, flat, any floating dtype; None counts as zeros.
        count: even, >= 2; costs count/2 hops.

    Returns:
        (count,), float64, on the communicator's device, equal on all ranks. The first is ‖X‖².
    """
    products = torch.zeros(count, dtype=torch.float64, device=communicator.device)
    for operator in operators:
        previous, current, _ = operator.scratch
        operator.load(signal, previous)
        operator.apply(previous, current)
        for hop in range(count // 2):
            if hop > 0:
                operator.apply(current, previous, alpha=2, beta=-1)
                previous, current = current, previous
            # Own rows of a cut row hold other ranks' columns too: only owned elements are summed.
            for before, after in zip(previous.answered, current.answered, strict=True):
                products[2 * hop] += _dot(before, before)
                products[2 * hop + 1] += _dot(before, after)
    communicator.sum_(products)
    # ⟨T_j X, T_j X⟩ = (μ_2j + μ_0)/2 and ⟨T_j X, T_{j+1} X⟩ = (μ_2j+1 + μ_1)/2.
    moments = 2 * products
    moments[0::2] -= products[0]
    moments[1::2] -= products[1]
    return moments


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.dot(a.reshape(-1), b.reshape(-1))


def squared_norm(signal: Signal, communicator: Communicator) -> torch.Tensor:
    """‖X‖² over all ranks, float64, 0-D, equal on all ranks (one all-reduce).

    Args:
        signal: this rank's fragments, flat, any floating dtype; None counts as zeros.
    """
    squares = torch.zeros(len(signal) + 1, dtype=torch.float64, device=communicator.device)
    for index, fragment in enumerate(signal):
        if fragment is not None:
            squares[index] = squared_norm_of(fragment)
    return communicator.sum_(squares.sum())
