"""What timing needs of a device: how long a step takes there, how fast a copy is, how much memory is free."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from benchmarks import UserError
from benchmarks.environment import processor
from benchmarks.memory import return_freed_memory
from benchmarks.speed.contender import STEP, Step
from ivon_kernels.backends import cpu

KERNEL, HOST = "kernel", "host"  # of a step on a GPU: on the device alone; until the call returns
_WALL_BLOCKS = 3


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
    least_peak = 2**20  # bytes: the resident set of a smaller workload says nothing

    def describe(self) -> dict[str, Any]:
        """What the figures were measured on."""
        return {
            "kind": self.kind,
            "name": processor(),
            "threads": torch.get_num_threads(),
            "simd": cpu.simd_level() if cpu.missing() is None else None,
            "memory": psutil.virtual_memory().total,
            "system": platform.platform(),
        }

    def synchronize(self) -> None:
        pass

    def mark(self) -> Any:
        """This moment: of the device's work on a GPU, whose host runs ahead."""
        return time.perf_counter()

    def span_ms(self, begin: Any, end: Any) -> float:
        """Milliseconds between two marks; the device must have finished."""
        return float(end - begin) * 1e3

    def spent_ms(self, call: Callable[[], object], wait: bool = True) -> float:
        """Time of a call on an idle device: with the device's work, or only until the call returns."""
        self.synchronize()
        begin = time.perf_counter()
        call()
        if wait:
            self.synchronize()
        return (time.perf_counter() - begin) * 1e3

    def wall_ms(self, step: Step, count: int) -> list[float]:
        """Time of a step, the device's work included, `count` times or for blocks of so many together."""
        times = []
        for _ in range(count):
            if step.before is not None:
                step.before()
            times.append(self.spent_ms(step.run))
        return times

    def kernel_ms(self, call: Callable[[], object], host_ms: float) -> float:
        """Time on the device of one call, from its first kernel to the end of its last."""
        return self.spent_ms(call)

    def step_ms(self, step: Step, count: int) -> dict[str, list[float]]:
        """Times of a whole step, for each of `kinds`."""
        if KERNEL not in self.kinds:
            return {STEP: self.wall_ms(step, count)}
        host = [self.spent_ms(step, wait=False) for _ in range(count)]
        kernel = [self.kernel_ms(step, statistics.median(host)) for _ in range(count)]
        return {STEP: self.wall_ms(step, count), KERNEL: kernel, HOST: host}

    def copy_gbps(self, repeats: int = 5) -> float:
        """GB/s of a large copy within the device's memory, counting bytes read and bytes written."""
        source = torch.empty(self.copy_bytes // 4, device=self.device).uniform_(-1, 1)
        target = torch.empty_like(source)
        target.copy_(source)
        times = [self.kernel_ms(lambda: target.copy_(source), 0.1) for _ in range(repeats)]
        return 2 * self.copy_bytes / statistics.median(times) / 1e6

    def free_bytes(self) -> int | None:
        """Memory that can be had, where asking for more would end the process; None where it would only fail."""
        return int(psutil.virtual_memory().available)

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
    reference_elements = 2**20  # its many small kernels take a second for 128 tensors of 4.2M (on an H200)
    least_peak = -1  # an allocator counts every byte

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise UserError("there is no CUDA device; --device cpu measures the processor, --dry-run tries the lines")
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._about = torch.cuda.get_device_properties(self.device)
        self._flush = torch.empty(4 * self._about.L2_cache_size, dtype=torch.uint8, device=self.device)
        cycles = 10_000_000
        spans = [self._span(lambda: torch.cuda._sleep(cycles)) for _ in range(2)]
        self._cycles_per_ms = cycles / spans[1]

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self._about.name,
            "memory": self._about.total_memory,
            "multiprocessors": self._about.multi_processor_count,
            "l2": self._about.L2_cache_size,
            "cuda": torch.version.cuda,
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def span_ms(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end))

    def _span(self, work: Callable[[], object]) -> float:
        begin = self.mark()
        work()
        end = self.mark()
        end.synchronize()
        return self.span_ms(begin, end)

    def wall_ms(self, step: Step, count: int) -> list[float]:
        """Steps in a row between two synchronizations; one by one where something comes before each."""
        if step.before is not None:
            return super().wall_ms(step, count)
        each = -(-count // _WALL_BLOCKS)

        def block() -> None:
            for _ in range(each):
                step.run()

        return [self.spent_ms(block) / each for _ in range(_WALL_BLOCKS)]

    def kernel_ms(self, call: Callable[[], object], host_ms: float) -> float:
        self.synchronize()
        self._flush.fill_(1)
        torch.cuda._sleep(int(self._cycles_per_ms * min(2 * host_ms + 0.1, 200.0)))
        return self._span(call)

    def free_bytes(self) -> int | None:
        return None

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
