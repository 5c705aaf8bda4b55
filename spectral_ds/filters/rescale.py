"""Rescaling: each parameter's signal keeps the norm that it had before the filter."""

from collections.abc import Sequence

import torch

from spectral_ds.sharding import Communicator, Signal, squared_norm_of


class NormKeeper:
    """Takes the norms of whole parameters and restores them.

    Args:
        owners: for each of this rank's fragments, the number of its parameter.
        parameters: number of parameters.
        communicator: the ranks that share the parameters.
    """

    def __init__(self, owners: Sequence[int], parameters: int, communicator: Communicator) -> None:
        self._owners = torch.tensor(owners, dtype=torch.int64, device=communicator.device)
        self._parameters = parameters
        self._communicator = communicator

    def norms(self, signal: Signal) -> torch.Tensor:
        """(parameters,), float64, equal on all ranks (one all-reduce)."""
        device = self._communicator.device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        squares = [
            zero if fragment is None else squared_norm_of(fragment).to(device)
            for fragment in signal
        ]
        total = torch.zeros(self._parameters, dtype=torch.float64, device=device)
        if squares:
            total.index_add_(0, self._owners, torch.stack(squares))
        return self._communicator.sum_(total).sqrt()

    def restore(self, signal: Signal, norms: torch.Tensor) -> None:
        """Scale every parameter to a norm taken before; one that is zero now stays zero."""
        now = self.norms(signal)
        factor = (norms / now).where(now > 0, torch.ones_like(now))[self._owners]
        for fragment, each in zip(signal, factor.unbind(), strict=True):
            if fragment is not None:
                fragment.mul_(each.to(fragment.device))
