"""Names for people."""

from collections.abc import Iterable

# In a message.
MOST_NAMES = 8


def listed(names: Iterable[str]) -> str:
    """Names for people; of many, the first and how many more."""
    found = list(names)
    more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
    return ", ".join(found[:MOST_NAMES]) + more
