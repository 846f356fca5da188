"""Launching compiled Triton kernels, and tables in device memory that follow arrays of the host.

Triton is imported when it is first needed: that takes longer than the rest of the package.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import ctypes
import functools
import importlib.util
import inspect
import os
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Union

import torch
from torch import Tensor

NUM_WARPS = 4
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}  # contraction would change the bits
_SPARE = 16  # pinned buffers kept ready for CUDA graphs, which cannot wait for an allocation
HostArray = Union["array[int]", bytearray]  # what tables are uploaded from
_Launch = Callable[[int, Sequence[int]], object]


def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU. Decided once, like Triton itself does."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def launched(function: Callable[..., None]) -> Any:
    """``triton.jit`` for kernels that :class:`Kernel` launches: no run-time argument is specialized on its value.

    Triton compiles a kernel anew for arguments that are 1 or divisible by 16, unless it is told not to; an annotation
    (``tl.int64``) fixes the type alone. :class:`Kernel` compiles once and launches that code with every later value:
    code that was specialized on the first launch's values drops masks, and writes beyond the tensors of the second.
    """
    import triton

    parameters = inspect.signature(function).parameters.values()
    return triton.jit(do_not_specialize=[p.name for p in parameters if "constexpr" not in str(p.annotation)])(function)


class Mirror:
    """A table in device memory with the content of an array on the host, copied there when its version changes.

    Copies start from pinned memory and nothing waits for them: a pinned buffer is written again only when the device
    has read it. A CUDA graph reads its tables again whenever it is replayed: a table that a graph was captured with is
    never written again, and a copy that is captured goes through buffers of its own.

    Args:
        device: Where the table is.
        content: Gives the content.
    """

    def __init__(self, device: torch.device, content: Callable[[], HostArray]) -> None:
        self.device = device
        self._content = content
        self._version: object = None
        self._address = 0
        self._table: Tensor | None = None
        self._ring: list[tuple[Tensor, Any]] = []  # pinned buffers, the next one first, with their copies' events
        self._spare: list[Tensor] = []
        self._in_graph = False  # a graph reads the table
        self._captured: list[Tensor] = []  # tables and pinned buffers that graphs read

    def address(self, version: object, capturing: bool) -> int:
        """Where the table is, once the current stream gets there.

        Args:
            version: Not equal to the last one if the content may have changed.
            capturing: Whether a CUDA graph is being captured.
        """
        if version != self._version:
            if capturing:
                return self._capture()
            self._upload()
            self._version = version
        self._in_graph |= capturing
        return self._address

    def _upload(self) -> None:
        content = self._content()
        size = _size(content)
        if self._table is not None and self._in_graph:
            self._captured.append(self._table)
            self._table, self._in_graph = None, False
        if self._table is None or self._table.numel() != size:
            self._table = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._address = self._table.data_ptr()
            if self._ring and self._ring[0][0].numel() != size:
                self._ring, self._spare = [], []
        if self.device.type == "cpu":
            _copy(content, self._table)
            return
        while len(self._spare) < _SPARE:
            self._spare.append(_pinned(size))
        module = torch.get_device_module(self.device)
        if not self._ring or not self._ring[0][1].query():
            self._ring.insert(0, (_pinned(size), module.Event()))
        pinned, event = self._ring.pop(0)
        _copy(content, pinned)
        self._table.copy_(pinned, non_blocking=True)
        event.record(module.current_stream(self.device))  # the copy's: the current device may be another
        self._ring.append((pinned, event))

    def _capture(self) -> int:
        content = self._content()
        size = _size(content)
        fits = bool(self._spare) and self._spare[-1].numel() == size
        pinned = self._spare.pop() if fits else _pinned(size)
        _copy(content, pinned)
        table = torch.empty(size, dtype=torch.uint8, device=self.device)
        table.copy_(pinned, non_blocking=True)
        self._captured += [pinned, table]
        return table.data_ptr()


def _size(content: HostArray) -> int:
    return memoryview(content).nbytes


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


def _copy(content: HostArray, to: Tensor) -> None:
    """Copy into a tensor on the host; ctypes takes a fraction of the time of tensor operations."""
    size = to.numel()
    ctypes.memmove(to.data_ptr(), (ctypes.c_char * size).from_buffer(content), size)


class Kernel:
    """One variant of a kernel on one device.

    Triton's own launch looks at every argument for what it may specialize on. All of ours are int64 and specialize
    nothing: the first launch goes through Triton, later ones call the compiled kernel.

    Args:
        kernel: A kernel decorated with :func:`launched`.
        device: Where it runs, on the current stream.
        flags: The constexpr arguments, which follow the int64 ones.
    """

    def __init__(self, kernel: Any, device: torch.device, flags: tuple[object, ...]) -> None:
        self._kernel, self._device, self._flags = kernel, device, flags
        self.launch: _Launch = self._interpret if interpreted() else self._first
        """Runs the kernel: takes the number of programs and the int64 arguments, all within the range of int64."""

    def _interpret(self, programs: int, args: Sequence[int]) -> None:
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        # Plain numbers would become int32 or uint32 where they are small, whatever the annotation says.
        numbers = [tl.tensor(TensorHandle(np.array([value], dtype=np.int64), tl.int64), tl.int64) for value in args]
        with np.errstate(all="ignore"):  # overflow is what it is on a GPU
            self._kernel[(programs,)](*numbers, *self._flags)

    def _first(self, programs: int, args: Sequence[int]) -> None:
        compiled = self._ordinary(programs, args)
        self.launch = _direct(compiled, self._device, self._flags) or self._ordinary

    def _ordinary(self, programs: int, args: Sequence[int]) -> Any:
        """Triton's own launch."""
        with torch.get_device_module(self._device).device(self._device):
            return self._kernel[(programs,)](*args, *self._flags, **OPTIONS)


def _direct(compiled: Any, device: torch.device, flags: tuple[object, ...]) -> _Launch | None:
    """A call of the compiled kernel as Triton 3.4 to 3.9 makes it itself, or None where its parts are others."""
    import triton
    from triton.runtime import driver

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not (3, 4) <= version <= (3, 9) or device.index is None:
        return None
    if not all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata")):
        return None
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    index, stream_of = device.index, driver.active.get_current_stream
    module = torch.get_device_module(device)
    current = module.current_device

    def launch(programs: int, args: Sequence[int]) -> None:
        # Four times None: no metadata and hooks for profilers.
        if current() == index:
            run(programs, 1, 1, stream_of(index), function, metadata, None, None, None, *args, *flags)
        else:
            with module.device(index):
                run(programs, 1, 1, stream_of(index), function, metadata, None, None, None, *args, *flags)

    return launch
