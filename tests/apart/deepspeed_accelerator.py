"""The device as DeepSpeed sees it."""

import contextlib
import functools
from typing import Any

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

import apart


class Accelerator(CPU_Accelerator):
    """What differs from the CPU."""

    Stream, Event = apart.Stream, apart.Event

    def __init__(self) -> None:
        super().__init__()
        self._name, self._communication_backend_name = apart.NAME, apart.BACKEND

    def is_synchronized_device(self) -> bool:
        return False

    def use_host_timers(self) -> bool:
        return True

    def resolves_data_dependency(self) -> bool:
        return False

    def handles_memory_backpressure(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return apart.NAME if device_index is None else f"{apart.NAME}:{device_index}"

    def current_device(self) -> int:
        return 0

    def current_device_name(self) -> str:
        return f"{apart.NAME}:0"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def device(self, device_index: int | None = None) -> Any:
        return contextlib.nullcontext()

    def stream(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def current_stream(self, device_index: int | None = None) -> Any:
        return apart.Stream()

    def default_stream(self, device_index: int | None = None) -> Any:
        return apart.Stream()

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == apart.NAME

    def is_fp16_supported(self) -> bool:
        return True

    def is_bf16_supported(self) -> bool:
        return True

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned()

    def pin_memory(self, tensor: torch.Tensor, align_bytes: int = 1) -> torch.Tensor:
        return tensor.pin_memory()

    def __getattribute__(self, name: str) -> Any:
        """`FloatTensor` and its like make tensors of the device."""
        if name in KINDS:
            return functools.partial(torch.tensor, dtype=KINDS[name], device=apart.NAME)
        return super().__getattribute__(name)


KINDS = {
    "BFloat16Tensor": torch.bfloat16,
    "ByteTensor": torch.uint8,
    "DoubleTensor": torch.float64,
    "FloatTensor": torch.float32,
    "HalfTensor": torch.float16,
    "IntTensor": torch.int32,
    "LongTensor": torch.int64,
}


def use() -> None:
    """Make it DeepSpeed's accelerator."""
    set_accelerator(Accelerator())
