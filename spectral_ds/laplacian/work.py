"""Work: what functions of L take at a step where they act."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What one function of L takes, or several together.

    Attributes:
        hops: products with L; None where a function has no series of products.
        transposes: signals that come to where a function of L is evaluated, or return from there; a
            filter's are two. Where rows stay, nothing is sent for it.
    """

    hops: int | None = 0
    transposes: int = 0

    def __add__(self, other: "Work") -> "Work":
        hops = None if self.hops is None or other.hops is None else self.hops + other.hops
        return Work(hops, self.transposes + other.transposes)
