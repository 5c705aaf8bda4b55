"""Memory: the bytes that work takes at its peak, on the device or else of the process."""

from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What resets the peak of the resident memory, see proc(5).
RESET_PEAK = "5"


class MemoryMeter:
    """Counts from now on.

    Args:
        device: whose memory counts; of the CPU it is that of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start: int | None = torch.cuda.memory_allocated(device)
            return
        try:
            RESET.write_text(RESET_PEAK)
        except OSError:  # not Linux, or not allowed
            self._start = None
        else:
            self._start = _resident("VmRSS")

    def peak(self) -> int | None:
        """Bytes at the peak beyond those at the start; None where that cannot be told."""
        if self._start is None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._start
        peak = _resident("VmHWM")
        return None if peak is None else peak - self._start


def _resident(field: str) -> int | None:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return None
