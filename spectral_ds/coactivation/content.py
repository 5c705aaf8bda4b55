"""Content of the files that inputs come from: what they say, wherever they lie."""

import hashlib
from pathlib import Path

PIECE_BYTES = 2**22
# Of a tokenizer, beside all that has "token" in its name.
VOCABULARIES = frozenset(("merges.txt", "vocab.json", "vocab.txt"))
SENTENCEPIECE = ".model"


def content_of(path: Path) -> str:
    """SHA-256, hexadecimal: of a file, or of the names and contents of all files in a folder.

    Raises:
        OSError: it cannot be read.
    """
    if path.is_file():
        digest = hashlib.sha256()
        _add(digest, path)
        return digest.hexdigest()
    return _of_files(path, [each for each in path.rglob("*") if each.is_file()])


def content_of_tokenizer(folder: Path) -> str:
    """The same of the files in a folder that are a tokenizer's.

    Raises:
        OSError: they cannot be read.
    """
    own = [
        each
        for each in folder.iterdir()
        if each.is_file()
        and ("token" in each.name or each.name in VOCABULARIES or each.suffix == SENTENCEPIECE)
    ]
    return _of_files(folder, own)


def _of_files(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        _add(digest, file)
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", path: Path) -> None:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
