"""What timing needs of a device: how long a step takes there, how much memory it takes, how fast a copy is."""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from benchmarks import UserError
from benchmarks.environment import processor
from benchmarks.memory import forget_peak, resident, return_freed_memory
from benchmarks.speed.contenders import STEP, Step
from ivon_kernels.backends import cpu

KERNEL, HOST = "kernel", "host"  # of a step on a GPU: on the device alone; until the call returns
_WALL_BLOCKS = 3
_MEASURABLE = 2**20  # bytes: the resident set of a smaller workload says nothing


class CpuClock:
    """The processor."""

    device = torch.device("cpu")
    kind = "cpu"
    kinds: tuple[str, ...] = (STEP,)  # what is taken of a whole step
    moving = STEP  # the one in which the bytes move
    copy_bytes = 2**28
    warm_up = 1  # calls before anything is timed; the first one creates state and compiles
    least = 3  # calls in a turn, unless one takes longer than a turn
    reference_elements = 2**17  # how many the reference computes as well: about 30 ms for a step of them

    def describe(self) -> dict[str, Any]:
        """What the figures were measured on."""
        missing = cpu.missing()
        return {
            "kind": self.kind,
            "name": processor(),
            "threads": torch.get_num_threads(),
            "simd": cpu.simd_level() if missing is None else None,
            "memory": psutil.virtual_memory().total,
            "system": platform.platform(),
        }

    def synchronize(self) -> None:
        """Wait for the device."""

    def wall_ms(self, step: Step, count: int) -> list[float]:
        """Time of a call, the device's work included, `count` times or for blocks of so many together."""
        return [self._call_ms(step) for _ in range(count)]

    def _call_ms(self, step: Step) -> float:
        if step.before is not None:
            step.before()
        self.synchronize()
        begin = time.perf_counter()
        step.run()
        self.synchronize()
        return (time.perf_counter() - begin) * 1e3

    def host_ms(self, step: Callable[[], object]) -> float:
        """Time until the call returns, the device having nothing to do."""
        self.synchronize()
        begin = time.perf_counter()
        step()
        return (time.perf_counter() - begin) * 1e3

    def kernel_ms(self, step: Callable[[], object], host_ms: float) -> float:
        """Time on the device of one call, from its first kernel to the end of its last."""
        return self.host_ms(step)

    def step_ms(self, step: Step, count: int) -> dict[str, list[float]]:
        """Times of a whole step, for each of `kinds`."""
        return {STEP: self.wall_ms(step, count)}

    def copy_gbps(self, repeats: int = 5) -> float:
        """GB/s of a large copy within the device's memory, counting bytes read and bytes written."""
        source = torch.empty(self.copy_bytes // 4, device=self.device).uniform_(-1, 1)
        target = torch.empty_like(source)

        def copy() -> None:
            target.copy_(source)

        copy()
        times = [self.kernel_ms(copy, 0.1) for _ in range(repeats)]
        return 2 * self.copy_bytes / statistics.median(times) / 1e6

    def free_bytes(self) -> int | None:
        """Memory that can be had, where asking for more would end the process; None where it would only fail."""
        return int(psutil.virtual_memory().available)

    def allocated(self) -> int:
        """Bytes in use now."""
        try:
            return resident("VmRSS")
        except OSError:
            return 0

    def reset_peak(self) -> None:
        """Forget the peak of the memory."""
        with contextlib.suppress(OSError):
            forget_peak()

    def peak_since(self, before: int) -> int | None:
        """By how much the peak exceeds what was in use `before`; None where that cannot be said."""
        try:
            growth = resident("VmHWM") - before
        except OSError:
            return None
        return growth if growth > _MEASURABLE else None

    def release(self) -> None:
        """Give unused memory back."""
        return_freed_memory()


class DryClock(CpuClock):
    """The processor in place of a GPU: every line of the suite runs, and its figures mean nothing."""

    kinds = (STEP, KERNEL, HOST)
    moving = KERNEL
    copy_bytes = 2**20
    least = 1

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "name": "a dry run, whose figures mean nothing"}

    def step_ms(self, step: Step, count: int) -> dict[str, list[float]]:
        host = [self.host_ms(step) for _ in range(count)]
        kernel = [self.kernel_ms(step, statistics.median(host)) for _ in range(count)]
        return {STEP: self.wall_ms(step, count), KERNEL: kernel, HOST: host}


class CudaClock(DryClock):
    """A GPU.

    Kernel times are spans between two events. The device is kept busy before the first one for longer than the host
    needs to launch the step, so that no gap between launches counts; and a buffer larger than its L2 cache is written
    before, so that nothing is found there that training would have pushed out.
    """

    kind = "cuda"
    copy_bytes = 2**31
    warm_up = 3
    least = 3
    reference_elements = 2**26

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise UserError("there is no CUDA device; --device cpu measures the processor, --dry-run tries the lines")
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
            "kind": self.kind,
            "name": properties.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def wall_ms(self, step: Step, count: int) -> list[float]:
        """Steps in a row between two synchronizations; one by one where something comes before each."""
        if step.before is not None:
            return super().wall_ms(step, count)
        each = -(-count // _WALL_BLOCKS)
        times = []
        for _ in range(_WALL_BLOCKS):
            self.synchronize()
            begin = time.perf_counter()
            for _ in range(each):
                step.run()
            self.synchronize()
            times.append((time.perf_counter() - begin) * 1e3 / each)
        return times

    def kernel_ms(self, step: Callable[[], object], host_ms: float) -> float:
        self.synchronize()
        self._flush.fill_(1)
        torch.cuda._sleep(int(self._cycles_per_ms * min(2 * host_ms + 0.1, 200.0)))
        return self._span(step)

    def free_bytes(self) -> int | None:
        return None

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_since(self, before: int) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) - before

    def release(self) -> None:
        torch.cuda.empty_cache()


def clock(device: str, dry_run: bool) -> CpuClock:
    """The clock of ``"cpu"`` or ``"cuda"``, or the dry run's.

    Raises:
        UserError: For another device, or if there is no GPU.
    """
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, not {device!r}")
    if dry_run:
        return DryClock()
    return CudaClock() if device == "cuda" else CpuClock()
