"""Settings: what is compared on what, as a user writes it in a YAML file.

Methods × learning rates × seeds × tasks. A method is a way to train, or something done to the
change that another method has made. Its dials are lists of values of its own keys: every
combination is a point of its frontier.
"""

# ruff: noqa: RUF009 - what makes a field is called in its default

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from spectral_ds.cli.errors import UserError
from spectral_ds.config import KEEP, LEARN, SpectralConfigError, load_config
from spectral_ds.config.checking import check
from spectral_ds.config.fields import choice, integer, rule
from spectral_ds.config.sources import plain

Kind = Literal["classification", "causal-lm"]
OptimizerName = Literal["adamw", "muon", "projection_decay", "half_whitened"]
AdapterName = Literal["none", "lora", "bitfit", "osf"]
AfterName = Literal["none", "by_depth", "early_stopping", "merge"]
Change = Literal["none", "shuffled", "diagonal"]
HeldOut = Literal["same", "by_seed"]

# Keys that a file has at its top, and nowhere else.
OF_FILES = ("extends", "quick")
# In a path of the dial, between keys.
DOT = "."
# Bytes of a task's name, which is a part of names of files.
LONGEST_NAME = 200
# What has dials.
TREES = ("section", "options")
# In the words of a method: a file of the section `statistics`.
STATISTICS = "statistics."
# Keys of a section or of options that may name files to read; and words there that are none.
TOKENIZER = "tokenizer"
INPUTS = ("keep", "learn", TOKENIZER)
NO_FILES = ("", "best", *KEEP, *LEARN)


def _any(value: Any) -> bool:
    return True


def _mapping(allowed: str = "a mapping") -> Any:
    return field(default_factory=dict, metadata={"allowed": allowed, "test": _any})


def _numbers(allowed: str, test: Any) -> Any:
    return rule((), allowed, lambda value: bool(value) and all(map(test, value)))


def _shares(default: Any) -> Any:
    return rule(
        default, "numbers from 0 to below 1", lambda v: v is None or all(0 <= a < 1 for a in v)
    )


@dataclass(frozen=True)
class TaskConfig:
    """What is learned."""

    data: str = rule("", "a file or folder of texts", bool)
    steps: int = integer(96, at_least=1)  # of the optimizer
    examples: int = integer(0, at_least=0)  # to train on, drawn by the seed; 0 = all
    per_class: int = integer(0, at_least=0)  # classification: so many of each; 0 = as they come


@dataclass(frozen=True)
class GeneralConfig:
    """What should not be forgotten."""

    data: str = rule("", "a file or folder of texts", bool)
    texts: int = integer(256, at_least=1)  # to choose by, and as many again to report


@dataclass(frozen=True)
class StatisticsConfig:
    """A file of statistics of activations, of the model before training; made once."""

    keep: str = rule("random", "random, generated or a file of texts", bool)
    change: Change = choice("none", Change)  # controls: no graph of this model any more
    rank: int = integer(64, at_least=1)
    samples: int = integer(256, at_least=1)
    length: int = integer(64, at_least=1)


@dataclass(frozen=True)
class MethodConfig:
    """A way to train, or what is done `after` another."""

    section: dict[str, Any] | None = rule(None, "a section spectral_ds", _any)
    optimizer: OptimizerName = choice("adamw", OptimizerName)
    adapter: AdapterName = choice("none", AdapterName)
    after: str = rule("", "a method's name", _any)  # the method whose runs it starts from
    by: AfterName = choice("none", AfterName)  # what is done to them
    options: dict[str, Any] = _mapping()  # of the optimizer, the adapter or `by`
    dial: dict[str, Any] = _mapping()  # lists of values by path: section.filter.tau, options.mu
    interpolated: tuple[float, ...] | None = _shares(None)  # instead of what all methods have
    rate: float = rule(1.0, "a number above 0", lambda value: value > 0)  # × each learning rate


@dataclass(frozen=True)
class Comparison:
    """All of it; checked by `load`."""

    model: str = rule("", "a folder, a name on the hub or a .gguf file", bool)
    kind: Kind = choice("classification", Kind)
    batch_size: int = integer(32, at_least=1)
    sequence_length: int = integer(64, at_least=2)  # tokens
    learning_rates: tuple[float, ...] = _numbers("numbers above 0", lambda value: value > 0)
    seeds: tuple[int, ...] = _numbers("whole numbers from 0 on", lambda value: value >= 0)
    validation: int = integer(512, at_least=1)  # examples of each task to choose by
    test: int = integer(1000, at_least=1)  # and to report
    held_out: HeldOut = choice("same", HeldOut)  # for all seeds, or drawn anew by each
    curve: int = integer(6, at_least=1)  # times that a run is looked at while it trains
    interpolated: tuple[float, ...] = _shares(())  # what is left of the change of each method
    baseline: str = rule("adamw", "a method's name", _any)  # that others are held against
    tasks: dict[str, Any] = _mapping("tasks by name")
    general: dict[str, Any] = _mapping("texts by name")
    statistics: dict[str, Any] = _mapping("statistics by name")
    methods: dict[str, Any] = _mapping("methods by name")
    only: tuple[str, ...] = rule((), "a list of methods' names", _any)  # to train; all by default
    drawn: tuple[str, ...] = rule((), "a list of methods' names", _any)  # named in figures; all
    quick: dict[str, Any] = _mapping()  # keys that --quick sets
    extends: str = rule("", "a file in the same folder", _any)  # with keys that this one lacks


SECTIONS = {
    "tasks": TaskConfig,
    "general": GeneralConfig,
    "statistics": StatisticsConfig,
    "methods": MethodConfig,
}


def load(path: Path, overrides: Sequence[str], quick: bool) -> tuple[Comparison, dict[str, Any]]:
    """Read and check a comparison.

    Args:
        path: a YAML file; `${oc.env:NAME}` stands for a variable of the environment.
        overrides: KEY=VALUE, that win over the file.
        quick: whether its section `quick` wins over the rest.

    Returns:
        The comparison, and what was written, without the values of variables.

    Raises:
        UserError: it cannot be used; all problems are in the message, one a line.
    """
    written = _read(path, overrides, quick)
    content = _resolved(written, path)
    problems: list[str] = []
    checked = check(Comparison, content, "comparison", problems)
    for name, schema in SECTIONS.items():
        sections = checked.get(name, {})
        checked[name] = {}
        for key, raw in sections.items():
            if not isinstance(key, str):  # in tables it would be text
                problems.append(f"{name}.{key}: must be text, so write it in quotes")
            valid = check(schema, {} if raw is None else raw, f"{name}.{key}", problems)
            checked[name][key] = schema(**valid)
    if not problems:
        comparison = Comparison(**checked)
        problems += _contradictions(comparison)
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    return comparison, cast(dict[str, Any], OmegaConf.to_container(written))


def _read(path: Path, overrides: Sequence[str], quick: bool) -> Any:
    try:
        found = _loaded(path, ())
    except (OSError, TypeError, ValueError, YAMLError, OmegaConfBaseException) as error:
        message = " ".join(str(error).split())
        raise UserError(f"--config {path}: cannot be read as YAML: {message}") from error
    of_quick = found.pop("quick", None) or {}
    if quick:
        found = _with_layer(found, f"--config {path}: quick", lambda: of_quick)
    for word in overrides:
        found = _with_layer(found, word, partial(OmegaConf.from_dotlist, [word]))
    return found


def _with_layer(content: Any, name: str, layer: Callable[[], Any]) -> Any:
    """Content with what wins over it, which a name stands for in messages."""
    try:
        over = layer()
        for key in OF_FILES:
            if key in over:
                raise UserError(f"{name}: {key} can only stand at the top of a file")
        return OmegaConf.merge(content, over)
    except (TypeError, ValueError, YAMLError, OmegaConfBaseException) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{name}: cannot be merged into the file's keys: {message}") from error


def _loaded(path: Path, extending: tuple[Path, ...]) -> Any:
    """A file over the one that it extends, whose section of tasks it replaces as a whole.

    Args:
        path: of the file.
        extending: those that extend it.
    """
    content: Any = OmegaConf.load(path)
    if not OmegaConf.is_dict(content):
        raise UserError(f"--config {path}: must hold a mapping")
    if "extends" not in content:
        return content
    files = (*extending, path)
    name = content.pop("extends")
    if not isinstance(name, str):
        raise UserError(f"--config {path}: extends = {name}: must be a file in the same folder")
    parent = path.parent / name
    if any(parent.resolve() == each.resolve() for each in files):
        names = " extends ".join(map(str, (*files, parent)))
        raise UserError(f"--config: {names}, and so on without end")
    before = _loaded(parent, files)
    if "tasks" in content:
        for section in (before, before.get("quick") or {}):
            section.pop("tasks", None)
    return OmegaConf.merge(before, content)


def _resolved(written: Any, path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = plain(written)
    except SpectralConfigError as error:
        raise UserError(f"--config {path}: {error}") from error
    return content


def _contradictions(comparison: Comparison) -> Iterator[str]:
    """Problems of values that are valid each, but not together."""
    for name in ("model", "learning_rates", "seeds", "tasks", "general", "methods"):
        if not getattr(comparison, name):
            yield f"{name}: is missing"
    if comparison.baseline not in comparison.methods:
        yield f"baseline = {comparison.baseline}: is none of {', '.join(comparison.methods)}"
    for name, task in comparison.tasks.items():
        if "/" in name or not name.isprintable() or len(name.encode()) > LONGEST_NAME:
            yield (
                f"tasks.{name}: must be a name that files can have: no /, nothing that cannot be "
                f"printed, at most {LONGEST_NAME} bytes"
            )
        if not task.data:
            yield f"tasks.{name}.data: is missing"
        if task.per_class and comparison.kind != "classification":
            yield f"tasks.{name}.per_class = {task.per_class}: belongs to kind classification"
    for name, general in comparison.general.items():
        if not general.data:
            yield f"general.{name}.data: is missing"
    measured = {Path(each.data).resolve(): n for n, each in comparison.general.items()}
    for name, each in comparison.statistics.items():
        yield from _measured_too(f"statistics.{name}.keep", each.keep, measured)
    for name, method in comparison.methods.items():
        yield from _of_method(name, method, comparison)
        for word in words_of(method):
            yield from _measured_too(f"methods.{name}", word, measured)
    for name in comparison.only:
        chosen = comparison.methods.get(name)
        if chosen is None:
            yield f"only = {name}: is none of {', '.join(comparison.methods)}"
        elif chosen.after and chosen.after not in comparison.only:
            yield f"only = {name}: comes after {chosen.after}, so name {chosen.after} too"
    for name in comparison.drawn:
        if name not in comparison.methods:
            yield f"drawn = {name}: is none of {', '.join(comparison.methods)}"


def _measured_too(key: str, word: str, measured: Mapping[Path, str]) -> Iterator[str]:
    """Refuse to keep the very texts that say whether they were kept."""
    name = measured.get(Path(word).resolve())
    if name is not None:
        yield f"{key} = {word}: is what general.{name} measures; take another half of such texts"


def _of_method(name: str, method: MethodConfig, comparison: Comparison) -> Iterator[str]:
    key = f"methods.{name}"
    if bool(method.after) != (method.by != "none"):
        yield f"{key}: `after` a method and `by` what go together"
        return
    if method.after:
        before = comparison.methods.get(method.after)
        if before is None or before.after or before.dial:
            yield f"{key}.after = {method.after}: must be a method that trains and has no dial"
        elif method.by == "early_stopping" and before.adapter != "none":
            yield f"{key}.by = early_stopping: not after adapter {before.adapter}"
        trains = [n for n in ("section", "optimizer", "adapter", "rate")
                  if getattr(method, n) != getattr(MethodConfig, n)]  # fmt: skip
        if trains:
            yield f"{key}.{trains[0]}: belongs to methods that train"
    if method.section is not None and (method.optimizer != "adamw" or method.adapter == "osf"):
        yield f"{key}.section: not with optimizer {method.optimizer}, adapter {method.adapter}"
    for path, values in method.dial.items():
        if not isinstance(values, list) or not values:
            yield f"{key}.dial.{path} = {values}: must be a list of values"
            return
        if path.partition(DOT)[0] not in TREES:
            yield f"{key}.dial.{path}: must begin with one of {', '.join(TREES)}"
            return
    for word in words_of(method):
        name = word.removeprefix(STATISTICS)
        if word.startswith(STATISTICS) and name not in comparison.statistics:
            known = ", ".join(comparison.statistics) or "nothing"
            yield f"{key}: {word} is not under statistics, which has {known}"
    try:
        settings = settings_of(method)
    except (TypeError, ValueError, IndexError):
        yield f"{key}.dial = {method.dial}: a path leads nowhere"
        return
    for setting in settings:
        section = setting.method.section
        if section is not None:
            try:
                load_config(section)
            except SpectralConfigError as error:
                yield from (f"{key}.section: {line}" for line in str(error).splitlines())
                return


def words_of(method: MethodConfig) -> Iterator[str]:
    """All strings in a method's section, options and dials, but keys."""
    for _, word in _words_in([method.section, method.options, method.dial], ""):
        yield word


def inputs_of(method: MethodConfig) -> Iterator[tuple[str, str]]:
    """What may be files that a method reads: key, word. Of dials, the key has the word too."""
    trained = {"section": method.section, "options": method.options}
    for key, word in _words_in(trained, ""):
        if _names_inputs(key) and word not in NO_FILES:
            yield key, word
    for path, values in method.dial.items():
        for key, word in _words_in(values, path):
            if _names_inputs(key) and word not in NO_FILES:
                yield f"dial.{path} = {word}", word  # its place may change


def _names_inputs(key: str) -> bool:
    return [each for each in key.split(DOT) if not each.isdigit()][-1] in INPUTS


def _words_in(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    """All strings in a tree of mappings and lists that stands under a key, each by its own."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, Mapping | list):
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for name, each in items:
            yield from _words_in(each, f"{key}{DOT}{name}" if key else str(name))


def chosen(comparison: Comparison) -> dict[str, MethodConfig]:
    """The methods to train."""
    names = comparison.only or comparison.methods
    return {name: each for name, each in comparison.methods.items() if name in names}


@dataclass(frozen=True)
class Setting:
    """A method with one value of each of its dials.

    Attributes:
        name: the dials, as people read them; empty without.
        method: with these values.
    """

    name: str
    method: MethodConfig


def settings_of(method: MethodConfig) -> list[Setting]:
    """All combinations of a method's dials."""
    found = []
    for values in product(*method.dial.values()):
        changed = {"section": method.section, "options": method.options}
        for path, value in zip(method.dial, values, strict=True):
            keys = path.split(DOT)
            changed = _with(changed, keys, value)
        name = " ".join(
            f"{path.rpartition(DOT)[2]}={value}"
            for path, value in zip(method.dial, values, strict=True)
        )
        own = {n: getattr(method, n) for n in MethodConfig.__dataclass_fields__} | changed
        found.append(Setting(name, MethodConfig(**own | {"dial": {}})))
    return found


def _with(tree: Any, keys: Sequence[str], value: Any) -> Any:
    """A tree of mappings and lists with one value replaced."""
    if not keys:
        return value
    first, *others = keys
    if isinstance(tree, list):
        at = int(first)
        return [*tree[:at], _with(tree[at], others, value), *tree[at + 1 :]]
    held: Mapping[str, Any] = tree or {}
    return {**held, first: _with(held.get(first), others, value)}
