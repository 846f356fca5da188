"""What timing needs of a device: a GPU's events, caches and memory, or the processor's stand-ins in a dry run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[], None]


class CpuClock:
    """A machine without a GPU: every part of the benchmark runs, and its figures mean nothing."""

    device = torch.device("cpu")
    copy_bytes = 2**20
    warm_up = 1  # steps before anything is timed; the first one creates state and compiles
    least = 2  # steps in a turn

    def describe(self) -> dict[str, Any]:
        """What the figures were measured on."""
        return {"device": "cpu: a dry run, whose figures mean nothing"}

    def synchronize(self) -> None:
        """Wait for the device."""

    def kernel_ms(self, step: Step, host_ms: float) -> float:
        """Time on the device of one step, from its first kernel to the end of its last."""
        return self.host_ms(step)

    def host_ms(self, step: Step) -> float:
        """Time until the call returns, the device having nothing to do."""
        begin = time.perf_counter()
        step()
        return (time.perf_counter() - begin) * 1e3

    def reset_peak(self) -> None:
        """Forget the peak of the memory."""

    def peak(self) -> int:
        """Most bytes of tensors since :meth:`reset_peak`; 0 where nobody counts."""
        return 0

    def allocated(self) -> int:
        """Bytes of tensors now."""
        return 0

    def release(self) -> None:
        """Give unused memory back."""


class CudaClock(CpuClock):
    """A GPU.

    Kernel times are spans between two events. The device is kept busy before the first one for longer than the host
    needs to launch the step, so that no gap between launches counts; and a buffer larger than its L2 cache is written
    before, so that nothing is found there that training would have pushed out.
    """

    copy_bytes = 2**31
    warm_up = 3
    least = 3

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self._flush = torch.empty(4 * properties.L2_cache_size, dtype=torch.uint8, device=self.device)
        self._cycles_per_ms = self._calibrate()

    def _span(self, work: Callable[[], Any]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def _calibrate(self) -> float:
        cycles = 10_000_000
        sleep: Callable[[int], None] = torch.cuda._sleep
        self._span(lambda: sleep(cycles))
        return cycles / self._span(lambda: sleep(cycles))

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "device": properties.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def kernel_ms(self, step: Step, host_ms: float) -> float:
        self.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.fill_(1)
        torch.cuda._sleep(int(self._cycles_per_ms * min(2 * host_ms + 0.1, 200.0)))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def host_ms(self, step: Step) -> float:
        self.synchronize()
        return super().host_ms(step)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def release(self) -> None:
        torch.cuda.empty_cache()


def clock(dry_run: bool) -> CpuClock:
    """The GPU's clock, or the processor's in a dry run."""
    return CpuClock() if dry_run else CudaClock()
