"""After training: what is made of the change that a run has made of the model.

Interpolation W₀ + α ΔW, the same by depth, the weights of the lowest validation loss, and the
filter of `spectral-ds merge`.
"""

import argparse
import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from spectral_ds.cli.compare.adapters import head_names
from spectral_ds.cli.compare.prepare import Prepared
from spectral_ds.cli.errors import UserError
from spectral_ds.cli.merge import add_parser as add_merge
from spectral_ds.graph.roles import places

Weights = Mapping[str, Tensor]

# Of a merge: what the run was trained on.
TRAINING = "training"


@torch.no_grad()
def interpolate(model: nn.Module, before: Weights, after: Weights, share: Any) -> None:
    """W₀ + α ΔW into a model; a new head stays as trained.

    Args:
        before: W₀, by name.
        after: W₀ + ΔW.
        share: α of a parameter's name.
    """
    heads = head_names(model)
    for name, parameter in model.named_parameters():
        if name in heads:
            parameter.copy_(after[name])
        else:
            parameter.copy_(torch.lerp(before[name], after[name], share(name)))


def share_by_depth(model: nn.Module, alpha: float) -> Any:
    """α at the first block to 1 at the last, linearly (LiNeS, arXiv 2410.17146).

    What stands before the blocks has α, what stands after them 1.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    blocks = {name: place.block for name, place in places(shapes).items()}
    last = max((block for block in blocks.values() if block is not None), default=0)
    shares, share = {}, alpha
    for name, block in blocks.items():  # in the model's order
        if block is not None:
            share = alpha + (1 - alpha) * (block / last if last else 1.0)
        shares[name] = share
    return shares.__getitem__


class _Parser(argparse.ArgumentParser):
    """Raises where the command would end the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"options of merge: {message}")


class Merge:
    """`spectral-ds merge` on the folder of one run.

    Args:
        prepared: has the base model.
        tuned: folder of the run's model.
        training: texts that the run was trained on.
    """

    def __init__(self, prepared: Prepared, tuned: Path, training: Path) -> None:
        self._prepared, self._tuned, self._training = prepared, tuned, training

    def model(self, options: Mapping[str, Any], num_classes: int) -> nn.Module:
        """The merged model.

        Args:
            options: of the command, by name.

        Raises:
            UserError: the command refuses them.
        """
        with tempfile.TemporaryDirectory(dir=self._tuned.parent) as folder:
            out = Path(folder) / "merged"
            words = ["merge", str(self._prepared.base), str(self._tuned), "--out", str(out)]
            for name, value in options.items():
                words += [f"--{name}", self._input(name, value, options)]
            parser = _Parser(prog="spectral-ds")
            add_merge(parser.add_subparsers())
            arguments = parser.parse_args([*words, "--json"])
            with contextlib.redirect_stdout(io.StringIO()):  # its report
                arguments.run(arguments)
            learned = out / "statistics" / "learn-1.safetensors"
            if learned.exists() and not self._learned(options).exists():
                shutil.copyfile(learned, self._learned(options))
            model: nn.Module = self._prepared.load(num_classes, out)
            return model

    def _input(self, name: str, value: Any, options: Mapping[str, Any]) -> str:
        if name == "learn" and self._learned(options).exists():
            return str(self._learned(options))
        if name == "learn" and value == TRAINING:
            return str(self._training)
        return self._prepared.file(str(value))

    def _learned(self, options: Mapping[str, Any]) -> Path:
        """Statistics that an earlier call with the same inputs has found."""
        looks = {n: options.get(n) for n in ("learn", "rank", "samples", "length")}
        name = "-".join(str(value).replace("/", "_") for value in looks.values())
        return self._tuned.parent / f"learned-{name}.safetensors"


def write_texts(path: Path, texts: list[str]) -> None:
    """Texts as a file that every command reads."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
