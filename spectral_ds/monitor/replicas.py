"""Replicas: whether ranks that hold the same weights still do."""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from spectral_ds.engines import Engine
from spectral_ds.monitor.norms import Values


class ReplicaCheck:
    """Compares what replicas have of each parameter, where an engine has replicas.

    What is compared are sums of squares in float64, which are there already: they are equal to the
    bit where weights are, and differ where one of them does in all but its last bits.

    Args:
        engine: whose weights; of ZeRO and FSDP2 without replicas, nothing is compared.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._has_replicas = engine.everyone.world_size > engine.communicator.world_size
        self._known: set[str] = set()

    def compare(self, step: int, names: Sequence[str], squares: Values) -> None:
        """Warn of parameters that differ, once each (collective where there are replicas).

        Args:
            names: of the parameters.
            squares: (parameters,): ‖θ‖² of each, summed over the ranks that share it.
        """
        if not self._has_replicas:
            return
        everyone = self._engine.everyone
        own = torch.from_numpy(np.stack((squares, -squares))).to(everyone.device)
        highest, lowest = everyone.maximum_(torch.nan_to_num(own)).cpu().numpy()
        apart = [n for n, is_apart in zip(names, highest != -lowest, strict=True) if is_apart]
        new = [name for name in apart if name not in self._known]
        self._known.update(new)
        if new:
            others = f" and {len(new) - 1} more" if len(new) > 1 else ""
            self._engine.log(
                f"step {step}: replicas do not hold the same weights: {new[0]}{others} differ "
                "between ranks; what each trains from here on is a model of its own",
                logging.WARNING,
            )
