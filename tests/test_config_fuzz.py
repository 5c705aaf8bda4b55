"""Whatever stands in the section, it loads, or every problem of it is named with key and reason.

`pytest tests/test_config_fuzz.py --hypothesis-profile=long` tries 10,000 sections.
"""

import copy
import dataclasses
import datetime
import re
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spectral_ds.config import PRESETS, SpectralConfig, SpectralConfigError, load_config
from spectral_ds.config.sources import printable

SECTIONS = 300

# What a user may write in the wrong place, or by a slip.
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**30, -(10**30), 2**63, 64, 512, 513]),
    st.floats(allow_nan=True, allow_infinity=True, width=32),
    st.sampled_from(["", "best", "auto", "none", "row", "1", "1e-3", "yes", "*", "[", "${x}", "é"]),
    st.text(max_size=5),
    st.lists(st.one_of(st.none(), st.integers(-2, 2), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(-2, 2), max_size=2),
)
WORDS = sorted({*PRESETS, "activations", "similarity", "depth", "pair", "ring", "gradient",
                "update", "tikhonov", "wiener", "window", "bands", "polynomial", "column",
                "training", "random", "generated", "given", "role", "joint",
                "decoupled"})  # fmt: skip


def schema_in(hint: Any) -> Any:
    """The dataclass that a field holds, alone or in a list; None: it holds none."""
    parts = (hint, *get_args(hint), *(p for a in get_args(hint) for p in get_args(a)))
    return next((part for part in parts if dataclasses.is_dataclass(part)), None)


def is_list(hint: Any) -> bool:
    return "tuple" in str(hint)


def values_of(hint: Any, rule: dataclasses.Field[Any]) -> st.SearchStrategy[Any]:
    """Values of a field: right ones, nearly right ones, and anything."""
    schema = schema_in(hint)
    words = [w for a in (hint, *get_args(hint)) for w in get_args(a) if isinstance(w, str)]
    right = [st.sampled_from(words)] if words else []
    if rule.default is not dataclasses.MISSING and schema is None:
        right.append(st.just(rule.default))
    if schema is not None:
        inner = sections_of(schema)
        return st.one_of(st.lists(inner, max_size=2) if is_list(hint) else inner, ANYTHING)
    return st.one_of(*right, st.floats(0, 1), st.integers(0, 20), st.sampled_from(WORDS), ANYTHING)


def sections_of(schema: Any) -> st.SearchStrategy[dict[Any, Any]]:
    """Some keys of a section, now and then one that it does not have."""
    hints = get_type_hints(schema)
    known = {f.name: values_of(hints[f.name], f) for f in dataclasses.fields(schema)}
    some = st.lists(st.sampled_from(sorted(known)), max_size=3, unique=True)
    right = some.flatmap(lambda names: st.fixed_dictionaries({n: known[n] for n in names}))
    slips = st.dictionaries(
        st.one_of(
            st.sampled_from([name[:-1] for name in known]),
            st.text(max_size=4),
            st.sampled_from([0, None, True, 1.5, ("a", 1), b"a", datetime.date(2020, 1, 1)]),
        ),
        ANYTHING,
        max_size=1,
    )
    return st.builds(lambda a, b: {**a, **b}, right, st.one_of(st.just({}), right, slips))


def paths_of(value: Any, path: str = "spectral_ds") -> set[str]:
    """Every key that stands in a section."""
    found = {path}
    if isinstance(value, dict):
        for key, inner in value.items():
            found |= paths_of(inner, f"{path}.{printable(str(key))}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            found |= paths_of(inner, f"{path}[{number}]")
    return found


def unknown_keys(schema: Any, section: dict[Any, Any], path: str = "spectral_ds") -> Iterator[str]:
    """Those that no field is named by, at every level that has the right type."""
    hints = get_type_hints(schema)
    for key, value in section.items():
        full = f"{path}.{printable(str(key))}"
        if key not in hints:
            yield full
            continue
        inner, many = schema_in(hints[key]), is_list(hints[key])
        if inner is not None and isinstance(value, list if many else dict):
            parts = {f"{full}[{i}]": e for i, e in enumerate(value)} if many else {full: value}
            for where, part in parts.items():
                if isinstance(part, dict):
                    yield from unknown_keys(inner, part, where)


@settings(
    max_examples=max(SECTIONS, settings().max_examples),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(sections_of(SpectralConfig))
def test_any_section_loads_or_its_problems_are_named(section):
    before, unknown = copy.deepcopy(section), list(unknown_keys(SpectralConfig, section))
    try:
        found = load_config(section)
    except SpectralConfigError as error:
        lines = str(error).splitlines()
        assert lines
        for line in lines:
            assert re.match(r"spectral_ds\..*: .{8,}", line)
        for path in unknown:
            assert any(re.match(f"{re.escape(path)} = .*: unknown key; ", line) for line in lines)
        own = paths_of(section) - {"spectral_ds"}
        assert any(path in line for line in lines for path in own)
    else:
        assert unknown == []
        assert isinstance(found, SpectralConfig)
        assert load_config(section).digest() == found.digest()
    assert repr(section) == repr(before)  # NaN is not itself
