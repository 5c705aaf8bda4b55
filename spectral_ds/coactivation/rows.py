"""Rows: which vectors of a tensor count, followed through all that is made of it.

A vector lies along the last dimension. Inside of a module of experts, tokens are flattened, picked
and sorted by expert, so that no shape tells any more which of them were padding.
"""

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# What picks vectors, or brings them into another order. All else leaves them where they are, if
# there are as many of them afterwards.
MOVES: frozenset[Callable[..., Any]] = frozenset(
    (
        torch.Tensor.__getitem__,
        *(
            getattr(place, name)
            for place in (torch, torch.Tensor)
            for name in ("chunk", "index_select", "movedim", "permute", "split", "transpose",
                         "tensor_split", "unbind", "flip", "roll")
        ),
        torch.Tensor.repeat,
        torch.Tensor.expand,
    )
)  # fmt: skip


class Rows:
    """Of tensors that are alive, which vectors count."""

    def __init__(self) -> None:
        # By id of a tensor: itself, and (...), bool, without its last dimension.
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}

    def set(self, x: torch.Tensor, counts: torch.Tensor) -> None:
        """Say which vectors of x count.

        Args:
            counts: bool, as many as x has vectors, in any shape.
        """
        self._known[id(x)] = weakref.ref(x), counts.reshape(x.shape[:-1])

    def of(self, x: object) -> torch.Tensor | None:
        """(...), bool: which vectors of x (..., n) count; None: that is not known."""
        if not isinstance(x, torch.Tensor):
            return None
        found, counts = self._known.get(id(x), (None, None))
        return counts if found is not None and found() is x else None

    def clear(self) -> None:
        """Forget all tensors."""
        self._known.clear()

    def follow(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Know of a function's results what is known of its first known argument."""
        if not self._known:
            return
        source = next((each for each in args if self.of(each) is not None), None)
        if source is None:
            return
        counts = self.of(source)
        assert counts is not None, "chosen by it"
        many = isinstance(result, tuple | list)
        results = result if many else (result,)
        moved: Any = itertools.repeat(None)
        if func in MOVES:
            if source is not args[0]:  # an index, say
                return
            shadow = func(counts.unsqueeze(-1).expand(source.shape), *args[1:], **kwargs)
            moved = shadow if many else (shadow,)
        for each, shadow in zip(results, moved, strict=False):
            if not isinstance(each, torch.Tensor) or each.dim() == 0 or each.numel() == 0:
                continue
            if shadow is not None:
                self.set(each, shadow[..., 0])
            elif each.numel() // each.shape[-1] == counts.numel():
                self.set(each, counts)
