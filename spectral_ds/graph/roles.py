"""Roles and blocks: which number in a parameter's name counts the blocks of its model.

In: names and shapes of all parameters of a model. Out: a `Place` for each.

Lists of modules put numbers into dotted names. The one that counts blocks varies among parameters
of equal shape and otherwise equal name. Others do not: of a wrapper that numbers its parts, of
stages whose blocks differ in shape. Where the numbers of two nested lists vary, the outer counts
blocks (layers with parts or experts), unless most kinds of parameters lie in the inner, as in a
list of whole models, or in stages that have some shape in common.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

# A list of modules: its dotted path, with "#" for the numbers of the lists that it lies in.
Path = tuple[str, ...]

# In the name of a list whose modules work side by side, not one after another: no blocks.
PARALLEL = "expert"


class Place(NamedTuple):
    """Where a parameter stands in its model.

    Attributes:
        role: its name with the number of its block replaced by `*`.
        block: that number; None if it is in no list of blocks.
    """

    role: str
    block: int | None


def places(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """The place of each parameter.

    In a model where no number varies, the first in each name counts.

    Args:
        shapes: of all parameters, by name.
    """
    paths = {name: tuple(name.split(".")) for name in shapes}
    lists = _Lists(paths, shapes)
    found = {}
    for name, path in paths.items():
        numbers = _numbers(path)
        if lists.vary:
            numbers = [at for at in numbers if _list_at(path, at) in lists.of_blocks]
        if numbers:
            at = numbers[0]
            found[name] = Place(".".join((*path[:at], "*", *path[at + 1 :])), int(path[at]))
        else:
            found[name] = Place(name, None)
    return found


def is_numbered(name: str) -> bool:
    """Whether a parameter lies in some list of modules."""
    return any(part.isdecimal() for part in name.split("."))


def _numbers(path: Path) -> list[int]:
    """Positions of the numbers that may count blocks."""
    # `isdigit` is true of ², which is no number.
    numbers = [at for at, part in enumerate(path) if part.isdecimal()]
    return [at for at in numbers if at == 0 or PARALLEL not in path[at - 1]]


def _list_at(path: Path, at: int) -> Path:
    """The list that the number at a position of a path counts in."""
    return tuple("#" if part.isdecimal() else part for part in path[:at])


class _Lists:
    """All lists of modules in a model.

    Attributes:
        of_blocks: those whose modules are blocks; none lies in another.
        vary: whether the number of any list varies.
    """

    def __init__(self, paths: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]]) -> None:
        # By list and otherwise equal name: the numbers there are.
        numbers: dict[Path, dict[tuple[Path, Path, tuple[int, ...]], set[int]]]
        numbers = defaultdict(lambda: defaultdict(set))
        for name, path in paths.items():
            for at in _numbers(path):
                others = path[:at], path[at + 1 :], shapes[name]
                numbers[_list_at(path, at)][others].add(int(path[at]))
        # Kinds of parameters, by their names without any number, for which a list's number varies.
        self._kinds: dict[Path, set[Path]] = defaultdict(set)
        self._length: dict[Path, int] = {}
        for where, by_others in numbers.items():
            for (before, after, _), values in by_others.items():
                if len(values) > 1:
                    kind = (*before, "#", *after)
                    self._kinds[where].add(_list_at(kind, len(kind)))
                    self._length[where] = max(len(values), self._length.get(where, 0))
        inside = {where: self._around(where) for where in self._kinds}
        beaten = {outer for inner in inside for outer in inside[inner] if self._beats(inner, outer)}
        self.of_blocks = {w for w in self._kinds if w not in beaten and not inside[w] - beaten}
        self.vary = bool(self._kinds)

    def _around(self, where: Path) -> set[Path]:
        """The lists whose number varies, that a list lies in."""
        outer = {where[:at] for at, part in enumerate(where) if part == "#"}
        return outer & self._kinds.keys()

    def _beats(self, inner: Path, outer: Path) -> bool:
        """Whether a list counts blocks, and not the list that it lies in."""
        mine, both = self._kinds[inner], self._kinds[inner] & self._kinds[outer]
        # As in layers with a few equal parts, most blocks are where the longer list is.
        is_longer = self._length[inner] >= self._length[outer] or 2 * len(both) < len(mine)
        return is_longer and len(mine) > len(self._kinds[outer] - mine)
