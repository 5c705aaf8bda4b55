"""Updates: what the base optimizer has just added to the weights, as a signal to filter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class Updates:
    """Holds the weights of before the step: one shard in their precision, allocated once.

    Args:
        weights: this rank's fragments, flat.

    Attributes:
        before: those weights, flat.
    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self.before = [torch.empty_like(each) for each in weights]

    def remember(self, weights: Sequence[torch.Tensor]) -> None:
        """Take the weights before the base optimizer's step."""
        if self.before:
            torch._foreach_copy_(self.before, list(weights))

    @contextmanager
    def of(self, weights: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """The updates, writable, in place of the weights; these follow when the body has ended."""
        updates = list(weights)
        if updates:
            torch._foreach_sub_(updates, self.before)
        try:
            yield updates
        finally:  # also of a step that failed, which may be tried again
            if updates:
                torch._foreach_add_(updates, self.before)
