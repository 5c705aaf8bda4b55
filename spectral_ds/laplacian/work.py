"""Work: what functions of L take at a step where they act."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Of one function of L, or of several together.

    Attributes:
        hops: products with L.
        moves: signals that come to where rows meet, or return from there; a filter's are two.
    """

    hops: int = 0
    moves: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.hops + other.hops, self.moves + other.moves)
