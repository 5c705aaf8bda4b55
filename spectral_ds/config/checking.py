"""Checking: values that a user has written against a schema of frozen dataclasses.

What is unknown, of the wrong type or out of range becomes a line that names key, value and what is
allowed; all problems of a file are found at once.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from spectral_ds.config.sources import printable, show


class _RefusedError(ValueError):
    """What is wrong with one value."""


def check(
    schema: Any, raw: Any, key: str, problems: list[str], elsewhere: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The keys of a mapping whose values are valid; what is not goes to `problems`.

    Args:
        schema: a dataclass of fields made by `rule` and its like.
        raw: the mapping, as it was written.
        key: where it stands, for messages.
        problems: gets one line a problem: key, value, what is allowed.
        elsewhere: keys of other sections that may have been meant, by their last name.
    """
    rules = {rule.name: rule for rule in fields(schema)}
    allowed = ", ".join(rules)
    if not isinstance(raw, Mapping):
        problems.append(f"{key} = {show(raw)}: must be a mapping with keys out of {allowed}")
        return {}
    hints = get_type_hints(schema)
    valid = {}
    for name, value in raw.items():
        full = f"{key}.{printable(str(name))}"
        if name not in rules:
            nearest = _nearest(str(name), key, list(rules), elsewhere or {})
            problems.append(
                f"{full} = {show(value)}: unknown key; nearest: {nearest} (allowed: {allowed})"
            )
            continue
        try:
            checked = _check_value(
                hints[name], rules[name].metadata, value, full, problems, elsewhere
            )
            valid[name] = checked
        except _RefusedError as refused:
            problems.append(f"{full} = {show(value)}: {refused}")
    return valid


def _check_value(
    hint: Any,
    rule: Mapping[str, Any],
    raw: Any,
    key: str,
    problems: list[str],
    elsewhere: Mapping[str, str] | None,
) -> Any:
    """Raw as the type of its field, or `_RefusedError`; sections report to problems."""
    schema = next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)
    is_list = get_origin(hint) is tuple
    if schema and not is_list:
        is_null = raw is None and type(None) in get_args(hint)
        return None if is_null else check(schema, raw, key, problems, elsewhere)
    if isinstance(raw, str):
        raw = rule.get("synonyms", {}).get(raw, raw)
    try:
        value = tuple(_sequence(raw)) if schema else _typed(hint, raw)
        valid = rule["test"](value) if rule else True
    except (TypeError, OverflowError):
        valid = False
    if not valid:
        raise _RefusedError(f"must be {rule.get('allowed', 'true or false')}")
    if schema:
        sections = enumerate(value)
        return tuple(check(schema, e, f"{key}[{i}]", problems, elsewhere) for i, e in sections)
    return value


def _typed(hint: Any, raw: Any) -> Any:
    """The value as the annotated type, without conversion other than int to float."""
    lists = [part for part in get_args(hint) if get_origin(part) is tuple]
    if lists:  # or None
        return None if raw is None else _typed(lists[0], raw)
    if get_origin(hint) is tuple:
        return tuple(_typed(get_args(hint)[0], element) for element in _sequence(raw))
    accepted = _accepted_types(hint)
    if type(raw) in accepted and type(raw) is not float:
        return raw
    is_number = isinstance(raw, int | float) and not isinstance(raw, bool)
    if float in accepted and is_number and math.isfinite(raw):
        return float(raw)
    raise TypeError


def _accepted_types(hint: Any) -> tuple[type, ...]:
    """The types of a hint's values; those of a Literal are for the field's own test to compare."""
    if get_origin(hint) is Literal:
        return tuple({type(value) for value in get_args(hint)})
    if get_origin(hint) is dict:
        return (dict,)
    parts = get_args(hint)
    return tuple(kind for part in parts for kind in _accepted_types(part)) if parts else (hint,)


def _sequence(raw: Any) -> list[Any] | tuple[Any, ...]:
    if isinstance(raw, list | tuple):
        return raw
    raise TypeError


def frozen(hint: Any, value: Any) -> Any:
    """Checked values as the annotated dataclasses and tuples; what is left out has its default."""
    # Not OmegaConf.to_object: OmegaConf 2.3 cannot merge into a schema of frozen dataclasses.
    if isinstance(value, dict):
        schema = next(part for part in (hint, *get_args(hint)) if is_dataclass(part))
        hints = get_type_hints(schema)
        return schema(**{name: frozen(hints[name], each) for name, each in value.items()})  # type: ignore[operator]
    if isinstance(value, list | tuple):
        return tuple(frozen(get_args(hint)[0], each) for each in value)
    return value


def _nearest(name: str, key: str, siblings: list[str], elsewhere: Mapping[str, str]) -> str:
    """The key that was probably meant: a similar one here, else one elsewhere, else any here."""
    similar = difflib.get_close_matches(name, siblings, n=1)
    if not similar and (found := difflib.get_close_matches(name, elsewhere, n=1)):
        return elsewhere[found[0]]
    return f"{key}.{(similar or difflib.get_close_matches(name, siblings, n=1, cutoff=0.0))[0]}"
