"""Tables and numbers as people read them on the terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

# Narrower terminals fold names; what is no terminal gets all of it.
WIDTH = 160
PREFIXES = ("", "k", "M", "G", "T", "P")


def make_console() -> Console:
    """Plain text: names may hold brackets, which are no markup."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=WIDTH)
    return console


def make_table(title: str, columns: Sequence[str], words: int = 1) -> Table:
    """A table whose first columns hold words, the others numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        is_word = index < words
        table.add_column(
            column,
            justify="left" if is_word else "right",
            overflow="fold",
            no_wrap=not is_word,
        )
    return table


def size(count: float) -> str:
    """Bytes for people: 1.23 GB."""
    power = 0
    while count >= 999.5 and power < len(PREFIXES) - 1:
        count /= 1000
        power += 1
    return f"{count:.0f} B" if power == 0 else f"{count:.3g} {PREFIXES[power]}B"


def duration(seconds: float) -> str:
    """Seconds for people: 12.3 ms."""
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{seconds * 1000:.3g} ms"
