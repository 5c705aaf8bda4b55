"""`apart`: a device of torch whose memory is apart from the host's, on a machine without a GPU.

A tensor there cannot be read, or joined with one of the host, as on CUDA; copies, numbers that are
read and allocations are seen. It shows what would not run on a GPU, and nothing of its speed.

`use()` makes torch and DeepSpeed know it. The extension is compiled once, and cached.
"""

import contextlib
import fcntl
import os
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

NAME = "apart"
BACKEND = f"cpu:gloo,{NAME}:{NAME}"


@cache
def extension() -> Any:
    """What is compiled: `allocations()`, `waits_are_errors(are)`, `Backend`."""
    from torch.utils.cpp_extension import get_default_build_root, load

    # torch looks for ninja there.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    sources = [str(Path(__file__).with_name(name)) for name in ("device.cpp", "collectives.cpp")]
    folder = Path(get_default_build_root(), "apart_device")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        # Torch's own lock, of one that was killed while it compiled: torch would wait for ever.
        (folder / "lock").unlink(missing_ok=True)
        return load("apart_device", sources, ["-O0"], build_directory=str(folder))


@cache
def use() -> None:
    """Make torch know the device and its collectives, and DeepSpeed take it for its accelerator."""
    compiled = extension()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _device_module())
    torch.utils.generate_methods_for_privateuse1_backend()

    def backend(store: dist.Store, rank: int, size: int, timeout: Any) -> Any:
        gloo = dist.ProcessGroupGloo(dist.PrefixStore(NAME, store), rank, size, timeout)
        return compiled.Backend(gloo)

    dist.Backend.register_backend(NAME, backend, devices=[NAME])
    torch.Tensor.record_stream = lambda self, stream: None  # all is done at once
    torch.nn.Module.to = _to
    from torch.distributed.fsdp._fully_shard import _fsdp_init, _fully_shard

    for module in (_fsdp_init, _fully_shard):
        module._move_states_to_device = _move_states
    from apart import deepspeed_accelerator

    deepspeed_accelerator.use()


class Stream:
    """The only one there is."""

    def __init__(self, *_: object, **__: object) -> None:
        self.device = torch.device(NAME, 0)

    def record_event(self, *_: object) -> "Event":
        """All that was asked for is done."""
        return Event()

    def __getattr__(self, name: str) -> Any:
        """Waiting: nothing to do."""
        return lambda *_: None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Event:
    """Has always happened."""

    def __init__(self, **_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def _device_module() -> types.ModuleType:
    """`torch.apart`, as `torch.cuda` is."""
    module, stream = types.ModuleType(f"torch.{NAME}"), Stream()
    contents = {
        "Stream": Stream,
        "Event": Event,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }
    for name, value in contents.items():
        setattr(module, name, value)
    return module


# torch gives a parameter that moves other memory only between devices of its own; here the
# parameter itself becomes another, and what holds it keeps it.


def _move(tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device.type in (device.type, "meta"):
        return
    moved = tensor.detach().to(device)
    if isinstance(tensor, torch.nn.Parameter):
        moved = torch.nn.Parameter(moved, tensor.requires_grad)
    torch.utils.swap_tensors(tensor, moved)


def _move_states(
    parameters: list[torch.nn.Parameter], buffers: list[torch.Tensor], device: torch.device
) -> None:
    for tensor in (*parameters, *buffers):
        _move(tensor, torch.device(device))


_usual_to = torch.nn.Module.to


def _to(self: torch.nn.Module, *arguments: Any, **named: Any) -> torch.nn.Module:
    device, *_ = torch._C._nn._parse_to(*arguments, **named)
    if device is not None and NAME in (device.type, *(p.device.type for p in self.parameters())):
        _move_states(list(self.parameters()), list(self.buffers()), device)
        named.pop("device", None)
        arguments = tuple(each for each in arguments if isinstance(each, torch.dtype))
        if not arguments and not named:
            return self
    return _usual_to(self, *arguments, **named)
