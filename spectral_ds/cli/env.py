"""`spectral-ds env`: what is installed, what works here, and how to get the rest."""

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from typing import Any

from spectral_ds.cli.arguments import add_command
from spectral_ds.cli.packages import installed_version

PACKAGES = (
    "spectral-ds", "torch", "deepspeed", "transformers", "torch-sparse", "torch-scatter",
    "omegaconf", "tensorboard", "safetensors",
)  # fmt: skip
# What else inspect or the launch scripts read: package, what for.
OPTIONAL = {"gguf": "models in .gguf files", "datasets": "datasets folders"}
EXAMPLES = """examples:
  spectral-ds env
  spectral-ds env --json
"""


def add_parser(commands: Any) -> None:
    """Add the command to the command line."""
    parser = add_command(
        commands,
        "env",
        run,
        summary="versions, kernels, engines and devices; what is missing and how to get it",
        description="Says what is installed and what works here: each multiply kernel is tried.\n"
        "Exit status 0, or 1 if no kernel works: then nothing can run.",
        examples=EXAMPLES,
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Look at this machine."""
    found = environment()
    if arguments.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        _show(found)
    return 0 if any(kernel["works"] for kernel in found["kernels"].values()) else 1


def environment() -> dict[str, Any]:
    """Versions, kernels, engines, devices, communication, and what is missing."""
    import torch

    from spectral_ds.laplacian.kernels import KERNELS

    dist = torch.distributed
    available = dist.is_available()
    backends = {
        "gloo": available and dist.is_gloo_available(),
        "nccl": available and dist.is_nccl_available(),
    }
    versions = {name: installed_version(name) for name in PACKAGES}
    kernels = {name: _outcome(_try_kernel, name) for name in KERNELS}
    engines = {
        "deepspeed": _outcome(_try_deepspeed),
        "fsdp2": _outcome(_try_fsdp2, any(backends.values())),
        "ddp": _outcome(_try_ddp, any(backends.values())),
        "one process": {"works": True, "detail": "any torch module and its optimizer"},
    }
    return {
        "versions": {"python": platform.python_version(), **versions},
        "kernels": kernels,
        "engines": engines,
        "devices": list(_devices()),
        "communication": backends,
        "missing": list(_missing(versions, kernels)),
    }


def _outcome(attempt: Any, *arguments: Any) -> dict[str, Any]:
    """Whether an attempt works, and its detail or what it raised."""
    try:
        return {"works": True, "detail": attempt(*arguments)}
    except Exception as error:  # whatever a broken installation raises
        reason = " ".join(str(error).split()) or type(error).__name__
        return {"works": False, "detail": reason}


def _try_kernel(name: str) -> str:
    """Multiply a tiny matrix on every kind of device."""
    import torch

    from spectral_ds.laplacian.kernels import multiply_tiny

    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for kind in kinds:
        multiply_tiny(name, torch.device(kind))
    return "on " + ", ".join(kinds)


def _try_deepspeed() -> str:
    """Import it, quietly, and look for the method that is hooked."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        deepspeed: Any = importlib.import_module("deepspeed")
        hooked = importlib.import_module("spectral_ds.engines.deepspeed").HOOKED
    if not hasattr(deepspeed.DeepSpeedEngine, hooked):
        raise RuntimeError(f"this version's engine has no {hooked}; use DeepSpeed 0.19")
    return "ZeRO 0 to 3"


def _try_fsdp2(has_backend: bool) -> str:
    from torch.distributed.fsdp import fully_shard

    _require(has_backend)
    return f"{fully_shard.__name__}, HSDP"


def _try_ddp(has_backend: bool) -> str:
    from torch.nn.parallel import DistributedDataParallel

    _require(has_backend)
    return DistributedDataParallel.__name__


def _require(has_backend: bool) -> None:
    if not has_backend:
        raise RuntimeError("torch was built without gloo and NCCL")


def _devices() -> Iterator[str]:
    import torch

    yield f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        yield f"cuda:{index}: {name}, {memory:.0f} GiB"


def _missing(versions: dict[str, Any], kernels: dict[str, Any]) -> Iterator[dict[str, str]]:
    """What does not work, what for, and the command that gets it."""
    for requirement in importlib.metadata.requires("spectral-ds") or ():
        found = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement)
        if found:
            name, least = found.groups()
            version = versions.get(name) or installed_version(name)
            if version is None or _numbers(version) < _numbers(least):
                why = "is not installed" if version is None else f"is {version}, too old"
                yield {
                    "what": name,
                    "why": f"required; {why}",
                    "command": f"{sys.executable} -m pip install '{requirement}'",
                }
    if not kernels["torch_sparse"]["works"]:
        yield {
            "what": "torch-sparse",
            "why": f"one of three multiply kernels; {kernels['torch_sparse']['detail']}",
            "command": f"{sys.executable} -m pip install --no-build-isolation torch-scatter "
            "torch-sparse",
        }
    for name, purpose in OPTIONAL.items():
        if installed_version(name) is None:
            yield {
                "what": name,
                "why": f"optional, for {purpose}",
                "command": f"{sys.executable} -m pip install {name}",
            }


def _numbers(version: str) -> list[int]:
    """Numbers of a release: [2, 13, 0] of 2.13.0+cpu."""
    found = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in found.group().split(".")] if found else []


def _show(found: dict[str, Any]) -> None:
    from spectral_ds.cli.terminal import make_console, make_table

    console = make_console()
    table = make_table("", ("what", "which", "found"), words=3)
    for name, version in found["versions"].items():
        table.add_row("version", name, version or "not installed")
    for part in ("kernels", "engines"):
        table.add_section()
        for name, outcome in found[part].items():
            sign = "yes" if outcome["works"] else "no"
            table.add_row(part.removesuffix("s"), name, f"{sign}: {outcome['detail']}")
    table.add_section()
    for device in found["devices"]:
        name, _, detail = device.partition(": ")
        table.add_row("device", name, detail)
    for name, works in found["communication"].items():
        table.add_row("communication", name, "yes" if works else "no")
    console.print(table)
    for missing in found["missing"]:
        console.print(f"missing: {missing['what']} ({missing['why']})\n  {missing['command']}")
    if not found["missing"]:
        console.print("nothing is missing")
