"""A CUDA graph without a GPU: keeps what a backend launches, by value, and launches it again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ivon_kernels.backends import triton, triton_launch
from tests.support.cuda_emulator import emulator


class Capture:
    """As ``torch.cuda.CUDAGraph``: nothing runs while :meth:`record` is entered, :meth:`replay` runs what came then.

    Make it before the optimizer, which keeps the kernels that it has met.
    """

    def __init__(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._backend = backend
        self._on = False
        self._launches: list[tuple[Callable[..., object], int, tuple[int, ...]]] = []
        if backend == "triton":
            make = triton._kernel
            monkeypatch.setattr(triton, "_kernel", lambda *key: _Recorded(make(*key), self))
            monkeypatch.setattr(triton, "is_capturing", lambda device: self._on)
            monkeypatch.setattr(triton_launch, "_pinned", _ordinary_memory)

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        self._launches.clear()
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def replay(self) -> None:
        if self._backend == "cuda":
            emulator().library.ivon_cuda_replay()
        for launch, programs, args in self._launches:
            launch(programs, args)

    def _switch(self, on: bool) -> None:
        self._on = on
        if self._backend == "cuda":
            emulator().library.ivon_cuda_record(int(on))


class _Recorded:
    """A Kernel whose launches are kept while a capture is on."""

    def __init__(self, kernel: Any, capture: Capture) -> None:
        self._kernel, self._capture = kernel, capture

    def launch(self, programs: int, args: Sequence[int]) -> None:
        if self._capture._on:
            self._capture._launches.append((self._kernel.launch, programs, tuple(args)))
        else:
            self._kernel.launch(programs, args)


def _ordinary_memory(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)
