"""Fields of a schema: a default, what is allowed in words, and the test of it."""

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, get_args

# What is chosen for the user. The Trainer of Hugging Face and Accelerate take every "auto" in a
# DeepSpeed JSON as theirs to fill, and stop; where they do not come first, it means the same.
BEST = "best"
SYNONYMS = {"auto": BEST}


def rule(
    default: object,
    allowed: str,
    test: Callable[[Any], bool],
    synonyms: Mapping[str, str] | None = None,
) -> Any:
    """A field.

    Args:
        default: where nothing is written.
        allowed: what is, in words.
        test: of a value of the right type.
        synonyms: words that stand for others.
    """
    metadata = {"allowed": allowed, "test": test, "synonyms": synonyms or {}}
    return field(default=default, metadata=metadata)


def choice(default: str, choices: Any) -> Any:
    """One of the words of a Literal."""
    allowed = get_args(choices)
    synonyms = SYNONYMS if BEST in allowed else None
    return rule(default, f"one of {', '.join(allowed)}", lambda value: value in allowed, synonyms)


def integer(default: int, at_least: int) -> Any:
    """A whole number from `at_least` on."""
    return rule(default, f"an integer >= {at_least}", lambda value: value >= at_least)


def not_negative(default: float) -> Any:
    """A number from 0 on."""
    return rule(default, "a finite number >= 0", lambda value: value >= 0)


def unit_interval(default: float) -> Any:
    """A number from 0 to 1."""
    return rule(default, "a number from 0 to 1", lambda value: 0 <= value <= 1)
