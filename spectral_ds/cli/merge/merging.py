"""Merging: what becomes of each tensor, and the shards of the result, one after another."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from spectral_ds.cli.errors import UserError
from spectral_ds.cli.merge.architecture import Architecture, Matrices, Place
from spectral_ds.cli.merge.combine import combine, is_unchanged
from spectral_ds.cli.merge.folder import Stored, Tensors
from spectral_ds.cli.merge.output import Output, Shard
from spectral_ds.cli.merge.statistics import Functions
from spectral_ds.console import progress


@dataclass(frozen=True)
class Sources:
    """Where a tensor of the result comes from.

    Attributes:
        base: its name in the base model; None: only the tuned model has it.
        tuned: its names in the tuned models, in their order.
        matrices: how it multiplies inputs; None: it does not.
        is_known: whether the model has such a parameter.
        is_blind: whether it is a matrix whose inputs cannot be watched.
    """

    base: str | None
    tuned: tuple[str, ...]
    matrices: Matrices | None = None
    is_known: bool = True
    is_blind: bool = False


@dataclass
class Tally:
    """What has become of tensors.

    Attributes:
        filtered: matrices whose change was filtered.
        scaled: tensors without inputs whose change was multiplied by `rest`.
        unchanged: tensors that no model has changed.
        taken: names of tensors that only the (first) tuned model has.
        unseen: matrices that no input to keep has entered: scaled.
        unlearned: matrices that no input to learn has entered, and others have: filtered with I
            for T.
        blind: matrices whose inputs cannot be watched (of `nn.MultiheadAttention`, say): scaled.
        unknown: tensors that the model does not know: scaled.
    """

    filtered: int = 0
    scaled: int = 0
    unchanged: int = 0
    taken: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    unlearned: list[str] = field(default_factory=list)
    blind: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Merging:
    """The tensors of the base and the tuned models, brought together.

    The result has the tensors of the first tuned model, under its names.

    Args:
        base: the pretrained model.
        tuned: the others.
        architectures: of the tuned models.

    Attributes:
        sources: of each tensor of the result.
        left_out: names of tensors that others have and the first tuned model lacks, by model.

    Raises:
        UserError: tensors differ in shape, are stored otherwise, or one model lacks some; or base
            and tuned model have none in common.
    """

    def __init__(
        self, base: Tensors, tuned: Sequence[Tensors], architectures: Sequence[Architecture]
    ) -> None:
        self._base, self._tuned, self.architecture = base, tuned, architectures[0]
        of_base = self.architecture.places(base.stored)
        of_tuned = [a.places(t.stored) for a, t in zip(architectures, tuned, strict=True)]
        keys = [self._keys(places) for places in (of_base, *of_tuned)]
        parts = {place.parameter for place in of_base.values()}
        self.sources: dict[str, Sources] = {}
        for name, place in of_tuned[0].items():
            self.sources[name] = self._sources(name, place, keys, place.parameter in parts)
        if not any(sources.base for sources in self.sources.values()):
            raise UserError(
                f"{tuned[0].given}: has no tensor of {base.given}, so it is no fine-tuned version "
                f"of it: one has {next(iter(of_tuned[0]), 'none')}, the other "
                f"{next(iter(of_base), 'none')}"
            )
        self.left_out: dict[str, list[str]] = {}
        for model, places in zip((base, *tuned), (of_base, *of_tuned), strict=True):
            lacking = [n for n, place in places.items() if place.key not in keys[1]]
            if lacking:
                self.left_out[model.given] = lacking

    def _keys(self, places: Mapping[str, Place]) -> dict[tuple[str, str, int], str]:
        """Names in a file by their places; a tied parameter that it lacks is the other one."""
        found = {place.key: name for name, place in places.items()}
        for name, place in places.items():
            for other in self.architecture.names.get(place.parameter, ()):
                found.setdefault(replace(place, parameter=other).key, name)
        return found

    def _sources(
        self,
        name: str,
        place: Place,
        keys: Sequence[Mapping[tuple[str, str, int], str]],
        base_has_parts: bool,
    ) -> Sources:
        base, first = self._base, self._tuned[0]
        in_base = keys[0].get(place.key)
        if in_base is None:
            if base_has_parts:
                raise UserError(
                    f"{name}: {base.given} stores it in other parts than {first.given}; load and "
                    "save both with this transformers: from_pretrained(OLD).save_pretrained(NEW)"
                )
            return Sources(None, (name,))
        names = [self._name_in(i, keys[i + 1], place, name) for i in range(len(self._tuned))]
        self._require_equal_shapes(name, [base.stored[in_base], *self._stored(names)])
        stored = first.stored[name]
        if not stored.dtype.is_floating_point:
            return Sources(None, (name,))
        matrices = self.architecture.matrices(name, place, stored)
        is_known = len(stored.shape) < 2 or place.parameter in self.architecture.names
        is_blind = self.architecture.is_blind(place)
        return Sources(in_base, tuple(names), matrices, is_known, is_blind)

    def _name_in(
        self, index: int, names: Mapping[tuple[str, str, int], str], place: Place, name: str
    ) -> str:
        found = names.get(place.key)
        if found is None:
            raise UserError(
                f"{self._tuned[index].given}: lacks {name}, which {self._base.given} and "
                f"{self._tuned[0].given} have"
            )
        return found

    def _stored(self, names: Sequence[str]) -> list[Stored]:
        return [model.stored[name] for model, name in zip(self._tuned, names, strict=True)]

    def _require_equal_shapes(self, name: str, stored: Sequence[Stored]) -> None:
        for model, each in zip(self._tuned, stored[1:], strict=True):
            if each.shape != stored[0].shape:
                raise UserError(
                    f"{name}: is {stored[0].shape} in {self._base.given} and {each.shape} in "
                    f"{model.given}; merge takes models of equal shape"
                )

    def write(
        self, output: Output, shards: Sequence[Shard], functions: Functions, rest: float
    ) -> Tally:
        """Make the shards that are not there yet."""
        total = Tally()
        with progress("merging", len(self.sources), "tensor", True) as update:
            for shard in shards:
                if not output.is_done(shard):
                    tally, tensors = Tally(), dict[str, torch.Tensor]()
                    for name in shard.names:
                        tensors[name] = self.merged(name, functions, rest, tally)
                        update(1)
                    output.write_shard(shard, tensors, vars(tally))
                else:
                    update(len(shard.names))
                total.add(Tally(**output.done[shard.file]))
        return total

    def merged(self, name: str, functions: Functions, rest: float, tally: Tally) -> torch.Tensor:
        """A tensor of the result, in the dtype of the first tuned model."""
        sources = self.sources[name]
        tuned = [m.read(n) for m, n in zip(self._tuned, sources.tuned, strict=False)]
        if sources.base is None:
            tally.taken.append(name)
            return tuned[0].contiguous()
        base = self._base.read(sources.base)
        if is_unchanged(base, tuned):
            tally.unchanged += 1
            return tuned[0].contiguous()
        out = torch.empty_like(tuned[0], memory_format=torch.contiguous_format)
        matrices = sources.matrices
        if matrices is None:
            combine(base, tuned, None, rest, out)
            tally.scaled += 1
            if not sources.is_known:
                tally.unknown.append(name)
            if sources.is_blind:
                tally.blind.append(name)
            return out
        views = [matrices.of(each) for each in (base, out, *tuned)]
        for index in range(matrices.count):
            number = matrices.first + index
            factors = functions.of(matrices.parameter, number)
            before, after, *others = (view[index] for view in views)
            combine(before, others, factors, rest, after)
            label = name if matrices.count == 1 else f"{name}[{number}]"
            if factors is None:
                tally.unseen.append(label)
                continue
            tally.filtered += 1
            if functions.unlearned(matrices.parameter, number):
                tally.unlearned.append(label)
        return out


def report_of(tally: Tally, merging: Merging, copied: Sequence[str]) -> dict[str, Any]:
    """What is told at the end, as plain values.

    Args:
        copied: files of weights that belong to no tensor of the model.
    """
    sorts = Counter(
        "matrices" if each.matrices is not None else "others" for each in merging.sources.values()
    )
    return {
        **vars(tally),
        "tensors": sum(sorts.values()),
        "tensors_with_inputs": sorts["matrices"],
        "left_out": merging.left_out,
        "copied": list(copied),
    }
