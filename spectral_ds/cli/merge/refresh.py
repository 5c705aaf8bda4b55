"""Refresh: statistics block by block, on what the merged blocks before have made of the inputs.

What it computes (RegMean++, with a base model and inputs to keep): let h_b be what the merged
model's blocks 0 … b − 1 make of a batch. R of block b is what enters the layers of the base model's
block b, called with h_b of inputs to keep; T_i, of the layers of tuned model i's block b, called
with h_b of its inputs to learn. Then block b is merged, and gives h_{b+1}. Matrices outside of
blocks get the statistics of the merged model itself: before the blocks first, behind them last.

Every batch goes through every block of every model once. Its h_b are kept; the model's own forward
calls block b with its masks and positions, while the blocks before only hand on what is kept.

In memory are the h_b, of the merged model what is outside of blocks (a head only at both ends), and
block b of each model, in float32.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spectral_ds.cli.errors import UserError
from spectral_ds.cli.merge.architecture import Architecture
from spectral_ds.cli.merge.folder import Tensors
from spectral_ds.cli.merge.in_memory import InMemory
from spectral_ds.cli.merge.looking import SEED, Amount, free_memory
from spectral_ds.cli.merge.skeleton import Skeleton
from spectral_ds.cli.merge.statistics import Functions, Graphs
from spectral_ds.coactivation import (
    Batch,
    Coactivation,
    Observer,
    Projections,
    Site,
    only_looking,
    summed,
)
from spectral_ds.console import progress
from spectral_ds.sharding import Communicator

# Of the parameters: a second list of blocks of this share is not taken for a detail.
OF_ANOTHER_LIST = 0.1


class _BlockDoneError(Exception):
    """Ends a forward pass behind the block that is looked at."""


class _Nothing(nn.Module):
    """In the place of a block: what is before it is looked at alone."""

    def forward(self, *_: Any, **__: Any) -> None:
        return None


class Refresh:
    """Statistics on the merged model's own activations.

    Args:
        base: the pretrained model.
        tuned: the others; a model of the first becomes the merged one.
        keep: batches of inputs to keep.
        learn: batches of each tuned model's inputs to learn; None: T = I.
        amount: how many directions are kept.
        mu, rest, scale: of the merge.
        asked: the option that it is for, for messages.

    Attributes:
        kept: R of all sites.
        learned: T of all sites, of each tuned model.

    Raises:
        UserError: the model is not one list of blocks, or a few of them do not fit into memory.
    """

    def __init__(
        self,
        base: Tensors,
        tuned: Sequence[Tensors],
        keep: Sequence[Batch],
        learn: Sequence[Sequence[Batch] | None],
        amount: Amount,
        mu: float,
        rest: float,
        scale: float,
        asked: str = "--refresh",
    ) -> None:
        self._asked = asked
        self._skeletons = [Skeleton(each) for each in (base, *tuned)]
        self._models = [each.model for each in self._skeletons]
        self._merged, self._amount = self._models[1], amount
        self._mu, self._rest, self._scale = mu, rest * scale, scale
        self._in_memory = InMemory(self._models[0], self._models[1:], self._merged)
        self._streams = [keep, *learn]
        self._projections = Projections(amount.rank, SEED, torch.device("cpu"))
        path = blocks_of(self._in_memory.architecture, asked)
        self._path = path
        self._blocks = [_at(Architecture(each), path, asked) for each in self._models]
        self.kept = Coactivation()
        self.learned: list[Coactivation | None] = [
            None if batches is None else Coactivation() for batches in learn
        ]
        # What the blocks so far have made of each batch of each stream.
        self._made: list[list[Any]] = [[None] * len(batches or ()) for batches in self._streams]
        self._require_memory()

    @property
    def names(self) -> dict[str, str]:
        """Of the merged model's parameters, by name within the base model."""
        architecture = self._in_memory.architecture
        return {architecture.short(name): name for name, _ in architecture.model.named_parameters()}

    def _require_memory(self) -> None:
        parameters = self._in_memory.architecture.parameters
        sizes = {name: 4 * parameter.numel() for name, parameter in parameters.items()}
        inside = [0] * len(self._blocks[0])
        for name, size in sizes.items():
            if name.startswith(f"{self._path}."):
                inside[int(name.removeprefix(f"{self._path}.").split(".")[0])] += size
        needed = sum(sizes.values()) - sum(inside) + max(inside) * len(self._models)
        if needed > (free := free_memory()):
            raise UserError(
                f"{self._asked}: one block of each model, and what is outside of blocks, are held "
                f"in float32: {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free"
            )

    def run(self) -> None:
        """Merge the first tuned model block by block; find all statistics."""
        sites, names = self._in_memory.architecture.sites, self._in_memory.names
        parameters = self._in_memory.architecture.parameters
        outside = [n for n in names if not n.startswith(f"{self._path}.")]
        with_sites = [n for n in outside if n in sites]
        count = len(self._blocks[0])
        batches = sum(len(each or ()) for each in self._streams)
        what = f"block by block ({self._asked})"
        with (
            ExitStack() as stack,
            progress(what, (2 * count + 2) * batches, "call", True) as update,
        ):
            for model in self._models:
                stack.enter_context(only_looking(model))
            merged = self._skeletons[1]
            merged.fill(n for n in parameters if not n.startswith(f"{self._path}."))
            self._write([n for n in outside if n not in sites])
            self._look_outside(with_sites, 0, update)
            self._write([n for n in with_sites if n in self.kept.leaders])
            missing = [n for n in with_sites if n not in self.kept.leaders]
            merged.release(missing)
            for block in range(count):
                self._look(block, update)
                own = merged.inside(f"{self._path}.{block}.")
                merged.fill(own)
                self._write([n for n in own if n in names])
                self._go_on(block, update)
                for skeleton in self._skeletons:
                    skeleton.release(skeleton.inside(f"{self._path}.{block}."))
            merged.fill(missing)
            self._look_outside(missing, count, update)

    def _write(self, names: Sequence[str]) -> None:
        """Merge parameters with what is known by now; then only the merged model has them."""
        if not names:
            return
        sites = self._in_memory.architecture.sites
        known = [n for n in names if n in sites and n in self.kept.leaders]
        functions = None
        if known:
            keep = Graphs(self.kept, sites, "--keep")
            learn = [
                None if each is None else Graphs(each, sites, "--learn") for each in self.learned
            ]
            functions = Functions(keep, learn, self._mu, self._scale)
        for name in names:
            for skeleton in self._skeletons:
                skeleton.fill([name])
            self._in_memory.write([name], functions, self._rest)
            for skeleton in (self._skeletons[0], *self._skeletons[2:]):
                skeleton.release([name])

    def _look(self, block: int, update: Callable[[int], object]) -> None:
        """R and T of a block: each model's own, behind merged ones."""
        sites = self._in_memory.architecture.sites
        prefix = f"{self._path}.{block}."
        for stream, batches in enumerate(self._streams):
            if batches is None:
                continue
            theirs = Architecture(self._models[stream]).sites
            own = [site for name, site in theirs.items() if name.startswith(prefix)]
            own = [site for site in own if site.parameter in sites]
            self._skeletons[stream].fill(self._skeletons[stream].inside(prefix))
            instead = self._blocks[stream][block]
            with self._watching(own) as observer:
                for number, batch in enumerate(batches):
                    self._call(batch, block, self._made[stream][number], instead)
                    update(1)
            self._add(stream, observer, own)

    def _look_outside(
        self, names: Sequence[str], block: int, update: Callable[[int], object]
    ) -> None:
        """R and T of matrices before (block 0) or behind the blocks."""
        sites = [self._in_memory.architecture.sites[name] for name in names]
        for stream, batches in enumerate(self._streams):
            if batches is None or not sites:
                update(len(batches or ()))
                continue
            with self._watching(sites) as observer:
                for number, batch in enumerate(batches):
                    self._call(batch, block, self._made[stream][number], _Nothing())
                    update(1)
            self._add(stream, observer, sites)

    def _go_on(self, block: int, update: Callable[[int], object]) -> None:
        """What the merged block makes of each batch."""
        for stream, batches in enumerate(self._streams):
            for number, batch in enumerate(batches or ()):
                made = self._call(batch, block, self._made[stream][number], None)
                self._made[stream][number] = made
                update(1)

    @contextmanager
    def _watching(self, sites: Sequence[Site]) -> Iterator[Observer]:
        observer = Observer(self._merged, sites, self._projections, torch.device("cpu"))
        observer.start()
        try:
            yield observer
        finally:
            observer.stop()

    def _add(self, stream: int, observer: Observer, sites: Sequence[Site]) -> None:
        alone = Communicator.alone(torch.device("cpu"))
        seen = [site for site in sites if site.parameter in observer.leaders]
        found = summed(observer, seen, self._projections, self._amount.rank, alone)
        if stream == 0:
            self.kept = self.kept | found
        else:
            self.learned[stream - 1] = (self.learned[stream - 1] or Coactivation()) | found

    def _call(self, batch: Batch, block: int, made: Any, instead: nn.Module | None) -> Any:
        """Call the merged model with a batch up to a block; what that block gives.

        Args:
            made: what the blocks before have made of it.
            instead: a block of another model in the place of the merged model's; None: its own.
        """
        blocks = self._blocks[1]
        changed: list[Any] = list(blocks[:block])
        for each in changed:
            each.forward = lambda *_, **__: made
        handle, result = None, None
        if block < len(blocks):
            current: Any = blocks[block]
            if instead is not None and instead is not current:
                # A function: a module would become one of the block's own.
                current.forward = lambda *given, **named: instead(*given, **named)
                changed.append(current)

            def end(_: nn.Module, __: Any, output: Any) -> None:
                nonlocal result
                result = output
                raise _BlockDoneError

            handle = current.register_forward_hook(end)
        try:
            batch(self._merged)
        except _BlockDoneError:
            pass
        finally:
            if handle is not None:
                handle.remove()
            for each in changed:
                del each.forward
        return result


def look_by_blocks(
    model: Tensors, batches: Sequence[Batch], amount: Amount, asked: str
) -> Coactivation:
    """The graphs of all layers of one model, in the memory of two blocks.

    It is the refresh of a model that nothing has changed.
    """
    refresh = Refresh(model, [model], batches, [None], amount, 0.0, 1.0, 1.0, asked)
    refresh.run()
    return with_names(refresh.kept, refresh.names)


def blocks_of(architecture: Architecture, asked: str) -> str:
    """The name of a model's list of blocks, within its base model.

    Raises:
        UserError: there is none, or there are several.
    """
    total = sum(p.numel() for p in architecture.parameters.values())
    lists: dict[str, int] = {}
    for name, module in architecture.model.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not is_inside:
            lists[name] = sum(p.numel() for p in module.parameters())
    large = [name for name, size in lists.items() if size > OF_ANOTHER_LIST * total]
    largest = max(lists, key=lambda name: lists[name], default=None)
    if largest is None or len(large) > 1:
        raise UserError(
            f"{asked}: block by block, a model is one list of blocks, and "
            f"{type(architecture.model).__name__} has {', '.join(large) or 'none'}"
        )
    return architecture.short(largest)


def _at(architecture: Architecture, path: str, asked: str) -> nn.ModuleList:
    found = {architecture.short(name): m for name, m in architecture.model.named_modules()}.get(
        path
    )
    if not isinstance(found, nn.ModuleList):
        raise UserError(f"{asked}: {type(architecture.model).__name__} has no blocks in {path}")
    return found


def with_names(found: Coactivation, names: dict[str, str]) -> Coactivation:
    """The same under other names."""
    leaders = {names[name]: names[leader] for name, leader in found.leaders.items()}
    return replace(
        found, leaders=leaders, spectra={names[n]: each for n, each in found.spectra.items()}
    )
