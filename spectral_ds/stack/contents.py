"""What the files say that a graph of activations is made of, wherever they lie.

A checkpoint may be gone on with where they have moved, and not where they say something else.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from spectral_ds.checkpoint import SavedState
from spectral_ds.coactivation import content_of, content_of_tokenizer
from spectral_ds.coactivation import file as statistics
from spectral_ds.config import KEEP, LEARN, EdgeConfig, SpectralConfigError
from spectral_ds.sharding import Communicator

# What an edge may name files for, in the order of the state; and the words that are none.
WORDS: Mapping[str, tuple[str, ...]] = {"keep": KEEP, "learn": LEARN, "tokenizer": ("",)}
BYTES, SHOWN = 32, 12  # of a SHA-256, and digits of one in a message


class Contents:
    """SHA-256 of the files that an edge names.

    Args:
        edge: of family `activations`.
        key: of the edge in the configuration.
        everyone: the ranks that read them.
        known: of files that are not read again.
    """

    def __init__(
        self, edge: EdgeConfig, key: str, everyone: Communicator, known: "Contents | None" = None
    ) -> None:
        self._edge, self._key, self._everyone = edge, key, everyone
        self._found: dict[str, str] = {} if known is None else dict(known._found)

    def read(self, what: str) -> None:
        """Look at the file of `keep` or `learn`, if it is one, and at the tokenizer (collective).

        Raises:
            SpectralConfigError: it cannot be read, or ranks read different ones; on all ranks.
        """
        for name in (what, "tokenizer"):
            if not self._is_file(name):
                continue
            of_ranks = self._everyone.gather_objects(self._own(name))
            for rank, content in enumerate(of_ranks):
                if content != of_ranks[0]:
                    raise SpectralConfigError(
                        f"{self._named(name)}: holds {_shown(of_ranks[0])} on rank 0 and "
                        f"{_shown(content)} on rank {rank}; all ranks must read the same"
                    )
            if of_ranks[0]:  # what is missing, its reader tells
                self._found[name] = of_ranks[0]

    def settings(self) -> dict[str, Any]:
        """The edge's configuration with what files say in the place of their names."""
        named = {name: f"SHA-256 {content}" for name, content in self._found.items()}
        unread = {} if self._reads_texts() else {"tokenizer": ""}
        return asdict(self._edge) | unread | named

    def tensor(self) -> torch.Tensor:
        """(names, 32), uint8: of each name of `WORDS`; 0 where it is no file."""
        rows = [self._found.get(name, "00" * BYTES) for name in WORDS]
        return torch.tensor(
            [list(bytes.fromhex(row)) for row in rows], dtype=torch.uint8, device="cpu"
        )

    def difference(self, saved: SavedState, name: str) -> str:
        """Which files say something else than a checkpoint's; empty if none is known to.

        Args:
            name: of `tensor` in the state.
        """
        there = saved.numbers.get(name)
        if there is None:
            return ""
        changed = []
        for what, before in zip(WORDS, there.reshape(-1, BYTES).to(torch.uint8), strict=True):
            now, then = self._found.get(what, ""), bytes(before.tolist()).hex() * bool(before.any())
            if now != then:
                changed.append(
                    f"{self._named(what)} holds {_shown(now)}, and the checkpoint is of "
                    f"{_shown(then)}"
                )
        return "; ".join(changed)

    def _is_file(self, name: str) -> bool:
        value = getattr(self._edge, name)
        return value not in WORDS[name] and (name != "tokenizer" or self._reads_texts())

    def _reads_texts(self) -> bool:
        """Whether a tokenizer has a part in it."""
        sources = (name for name in ("keep", "learn") if self._is_file(name))
        return any(not getattr(self._edge, name).endswith(statistics.SUFFIX) for name in sources)

    def _own(self, name: str) -> str:
        """What this rank reads; empty if there is nothing (a tokenizer may be one of the hub)."""
        path = Path(getattr(self._edge, name))
        with self._everyone.all_or_none():
            try:
                if not path.exists():
                    return ""
                return content_of_tokenizer(path) if name == "tokenizer" else content_of(path)
            except OSError as error:
                raise SpectralConfigError(
                    f"{self._named(name)}: cannot be read: {error.strerror or error}"
                ) from error

    def _named(self, name: str) -> str:
        return f'{self._key}.{name} = "{getattr(self._edge, name)}"'


def _shown(content: str) -> str:
    return f"SHA-256 {content[:SHOWN]}" if content else "no file"
