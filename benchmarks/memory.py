"""How much memory a block of code takes at its peak."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from types import TracebackType

import torch

_MEGABYTE = 2**20


class PeakMemory:
    """The peak of memory in a block above what was in use before it.

    On a CUDA device this is what torch has allocated there; elsewhere the resident set of the process, on Linux.

    Attributes:
        megabytes: After the block; None where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.megabytes: float | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before: int | None = torch.cuda.memory_allocated(self._device)
        else:
            self._before = _reset_resident_peak()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is None:
            return
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _status("VmHWM")
        self.megabytes = max(0.0, (peak - self._before) / _MEGABYTE)


def _reset_resident_peak() -> int | None:
    """Have the peak begin anew; the resident bytes now, or None where that cannot be."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # what was freed before and kept would hide the same amount of growth
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
