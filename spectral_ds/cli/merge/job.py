"""Job: one call of `spectral-ds merge`, from its arguments to what it writes."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from spectral_ds.cli.errors import UserError
from spectral_ds.cli.merge.adapter import Adapter, is_adapter
from spectral_ds.cli.merge.architecture import Architecture, is_causal
from spectral_ds.cli.merge.folder import SMALL, Folder
from spectral_ds.cli.merge.frontier import frontier
from spectral_ds.cli.merge.judges import judge_for
from spectral_ds.cli.merge.looking import (
    GENERATED,
    IN_USE,
    RANDOM,
    Amount,
    batches_of,
    elements_of,
    fits,
    free_memory,
    load_whole,
    loaded,
    look,
    tokenizer_of,
    written_batches,
)
from spectral_ds.cli.merge.merging import Merging, report_of
from spectral_ds.cli.merge.output import Output, plan
from spectral_ds.cli.merge.refresh import Refresh, look_by_blocks, with_names
from spectral_ds.cli.merge.statistics import Functions, Graphs, read
from spectral_ds.cli.merge.sweep import MUS, RESTS, SCALES, Setting, recommended, sweep, write_table
from spectral_ds.coactivation import Batch, Coactivation, content_of
from spectral_ds.coactivation import file as statistics

NONE, BEST = "none", "best"


class Job:
    """A merge, or a sweep.

    Args:
        arguments: of the command line.
        making: those that make the result, as plain values.

    Raises:
        UserError: something cannot be used.
    """

    def __init__(self, arguments: argparse.Namespace, making: Mapping[str, Any]) -> None:
        self._arguments = arguments
        self._base = Folder(arguments.base)
        self._tuned: list[Folder | Adapter] = [
            Adapter(given, self._base) if is_adapter(given) else Folder(given)
            for given in arguments.tuned
        ]
        self._keep: str = _best(self._base) if arguments.keep == BEST else arguments.keep
        architectures = [Architecture.of(each.config, each.given) for each in self._tuned]
        self._sites = architectures[0].sites
        self._merging = Merging(self._base, self._tuned, architectures)
        count = len(self._tuned)
        self._learn: list[str] = list(arguments.learn) * (count // len(arguments.learn))
        self._amount = Amount(arguments.samples, arguments.length, arguments.rank)
        self._output = Output(arguments.out, {**making, "keep": self._keep}, self._fingerprints())

    def _fingerprints(self) -> dict[str, str]:
        found = {each.given: each.fingerprint() for each in (self._base, *self._tuned)}
        files = [self._keep, *self._learn, self._arguments.task, self._arguments.general]
        for given in files:
            if given not in (RANDOM, GENERATED, NONE, None):
                found[str(given)] = content_of(Path(given))
        return found

    @property
    def hint(self) -> str:
        """What the user should know of such a merge; empty: nothing."""
        if not is_causal(self._base.config) or self._learn != [NONE] * len(self._learn):
            return ""
        return (
            "Nothing was named to learn, and a language model learns too little so: "
            "--learn FILE names texts that TUNED was trained on."
        )

    def leave_if_empty(self) -> None:
        """Leave no folder behind that holds nothing and refuses other arguments."""
        self._output.leave_if_empty()

    # Merging

    def merge(self) -> dict[str, Any]:
        """Write the merged model; what was done."""
        arguments, output = self._arguments, self._output
        tuned = self._tuned[0]
        shards = plan(tuned.stored, arguments.shard_size * 1e9)
        if all(output.is_done(shard) for shard in shards) and output.report:
            return output.report
        # What cannot be read is told before anything is computed.
        copied = [name for name in tuned.small_files() if Path(name).suffix not in SMALL]
        if arguments.refresh:
            self._refresh()
        functions = Functions(*self._statistics(halves=False), arguments.mu, arguments.scale)
        tally = self._merging.write(output, shards, functions, arguments.rest * arguments.scale)
        output.finish(shards, tuned, report_of(tally, self._merging, copied))
        return output.report

    # Statistics

    def _statistics(self, halves: bool) -> tuple[Graphs, list[Graphs | None]]:
        """R, and T of each tuned model; what is found is written, and read where it is there.

        Args:
            halves: whether files that settings are judged on are used by half.
        """
        keep = self._graphs("keep", self._keep, None, halves)
        assert keep is not None, "inputs to keep are always named"
        learn = [
            self._graphs(f"learn-{number}", source, tuned, halves)
            for number, (source, tuned) in enumerate(
                zip(self._learn, self._tuned, strict=True), start=1
            )
        ]
        return keep, learn

    def _graphs(
        self, what: str, source: str, tuned: "Folder | Adapter | None", halves: bool
    ) -> Graphs | None:
        """The graphs of some inputs.

        Args:
            what: under which name they are written.
            source: of the inputs.
            tuned: model that is called; None: the base model.
            halves: see `_statistics`.
        """
        if source == NONE:
            return None
        path, rank = self._output.statistics(what), self._amount.rank
        if source.endswith(statistics.SUFFIX):
            return read(Path(source), rank, self._sites)
        if path.exists():
            return read(path, rank, self._sites)
        option = "--keep" if tuned is None else "--learn"
        judged = [each for each in (self._arguments.task, self._arguments.general) if each]
        half = 0 if halves and any(_is_same(Path(source), each) for each in judged) else None
        asked = f"{option} {source}"
        if isinstance(tuned, Adapter) and not fits(self._base):
            batches = self._forward_batches(source, option, tuned, half)
            found = look_by_blocks(tuned, batches, self._amount, asked)
        else:
            with loaded(tuned or self._base, self._base) as model:
                batches = batches_of(
                    source, option, model, self._amount, lambda: self._tokenizer(tuned), half
                )
                found = look(model, batches, self._amount, asked[2:])
        self._save(path, found, source)
        return Graphs(found, self._sites, source)

    def _save(self, path: Path, found: Coactivation, source: str) -> None:
        rank = self._amount.rank
        try:
            statistics.save(path, found, source, rank)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from error

    def _tokenizer(self, tuned: "Folder | Adapter | None") -> Any:
        own = [] if tuned is None else [tuned]
        return tokenizer_of(*own, self._base, *self._tuned)

    # Models in memory

    def _load_all(self) -> tuple[nn.Module, list[nn.Module]]:
        """The base and all tuned models, in float32; a sweep makes one more."""
        needed = 4 * elements_of(self._base) * (2 + len(self._tuned)) * IN_USE
        free = free_memory()
        if needed > free:
            raise UserError(
                f"--sweep holds all models in memory in float32: {needed / 1e9:.3g} GB, and "
                f"{free / 1e9:.3g} GB are free"
            )
        return load_whole(self._base, self._base), [
            load_whole(each, self._base) for each in self._tuned
        ]

    def _refresh(self) -> None:
        """Find statistics block by block, and write them."""
        found_before = [self._output.statistics("keep")] + [
            self._output.statistics(f"learn-{number}")
            for number, source in enumerate(self._learn, start=1)
            if source != NONE
        ]
        if all(path.exists() for path in found_before):
            return
        arguments = self._arguments
        keep = self._forward_batches(self._keep, "--keep", None)
        learn = [
            None if source == NONE else self._forward_batches(source, "--learn", each)
            for source, each in zip(self._learn, self._tuned, strict=True)
        ]
        refresh = Refresh(
            self._base,
            self._tuned,
            keep,
            learn,
            self._amount,
            arguments.mu,
            arguments.rest,
            arguments.scale,
        )
        refresh.run()
        for number, (graphs, source) in enumerate(zip(refresh.learned, self._learn, strict=True)):
            if graphs is not None:
                path = self._output.statistics(f"learn-{number + 1}")
                self._save(path, with_names(graphs, refresh.names), source)
        kept = with_names(refresh.kept, refresh.names)
        self._save(self._output.statistics("keep"), kept, self._keep)

    def _forward_batches(
        self, source: str, option: str, tuned: "Folder | Adapter | None", half: int | None = None
    ) -> Sequence[Batch]:
        """Batches that call a model once each."""
        amount, own = self._amount, tuned or self._base
        if source == GENERATED:
            with loaded(own, self._base) as model:
                written = batches_of(source, option, model, amount, None, None)
                return written_batches(written, model)
        model = Architecture.of(own.config, own.given).model
        return batches_of(source, option, model, amount, lambda: self._tokenizer(tuned), half)

    def sweep(self) -> tuple[list[Setting], str, list[Path]]:
        """Judge settings; what they give, what `general` is, and the files that are written."""
        arguments = self._arguments
        keep, learn = self._statistics(halves=True)
        base, tuned = self._load_all()
        target = load_whole(self._tuned[0], self._base)
        judge, general = judge_for(
            target, arguments.task, arguments.general, self._tokenizer(self._tuned[0]), self._amount
        )
        mus = sorted({*MUS, arguments.mu})
        rests = sorted({*RESTS, arguments.rest})
        scales = sorted({*SCALES, arguments.scale}, reverse=True)
        settings = sweep(base, tuned, target, keep, learn, judge, mus, rests, scales)
        best = recommended(settings)
        written = [arguments.out / "sweep.csv", arguments.out / "frontier.png"]
        write_table(settings, written[0])
        label = f"forgetting ({general})"
        frontier(settings, best, label).savefig(written[1])
        return settings, general, written


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and one.resolve() == other.resolve()


def _best(base: Folder) -> str:
    """The inputs to keep that have measured best for a model's kind."""
    return GENERATED if is_causal(base.config) else RANDOM
