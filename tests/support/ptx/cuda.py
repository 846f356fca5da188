"""nvcc's PTX in the place of a GPU: launch.cu itself, on a CUDA runtime that hands its launches over.

nvcc compiles csrc/cuda/launch.cu for the host and to PTX. Instead of the CUDA runtime cudart.cpp is linked to it: what
``cudaLaunchKernel`` is given, the arguments as they were packed, is what the PTX reads.
"""

from __future__ import annotations

import ctypes
import functools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ivon_kernels.backends import Guard, Launch
from ivon_kernels.backends.addresses import DTYPES
from ivon_kernels.backends.cuda import CudaBackend
from tests.support.cuda_emulator import COMPILER, SOURCE
from tests.support.kept import digest, kept
from tests.support.ptx.machine import program
from tests.support.ptx.memory import Global, Span, span_of
from tests.support.ptx.text import PtxError
from tests.support.ptx.triton import spans_of

NVCC = shutil.which("nvcc")
_FLAGS = ("-std=c++17", "-O3", "-shared", "--cudart=none", "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off")
_RUNTIME = Path(__file__).with_name("cudart.cpp")
_Taker = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint64, ctypes.POINTER(ctypes.c_void_p)
)


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@functools.cache
def _version() -> str:
    return subprocess.run([str(NVCC), "--version"], capture_output=True, text=True, check=True).stdout


def _compiled(gpu: str, source: Path, contracted: bool) -> tuple[Path, str]:
    """The library for the host, and the PTX of its kernels. Without an assembler this takes half a minute."""
    target = gpu.replace("sm_", "compute_")
    flags = (*_FLAGS, f"--fmad={str(contracted).lower()}", f"-gencode=arch={target},code={target}")
    sources = [path for path in source.parents[1].rglob("*.[hc]*") if path.is_file()]
    name = digest((_version(), flags), [_RUNTIME, *sources])

    def make(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "library.so"
            _run(str(NVCC), *flags, "--keep", f"--keep-dir={folder}", str(source), str(_RUNTIME), "-o", str(library))
            (ptx,) = Path(folder).glob("launch*.ptx")
            path.write_text(json.dumps({"library": library.read_bytes().hex(), "ptx": ptx.read_text()}))

    both = kept(f"ptx-cuda-{gpu}-{name}.json", make)

    def unpack(path: Path) -> None:
        path.write_bytes(bytes.fromhex(json.loads(both.read_text())["library"]))

    return kept(f"libivon_cuda_of_tests-{gpu}-{name}.so", unpack), json.loads(both.read_text())["ptx"]


class PtxCudaBackend(CudaBackend):
    """Backend cuda, with nvcc's PTX executed on tensors of the CPU.

    Args:
        gpu: Whose code it runs.
        seed: Of the order of warps and blocks; None: all in step.
        source: Another launch.cu.
        contracted: Whether products and sums are contracted.
        edit: What is done to the PTX.
    """

    def __init__(
        self,
        gpu: str = "sm_90",
        *,
        seed: int | None = None,
        source: Path = SOURCE,
        contracted: bool = False,
        edit: Callable[[str], str] | None = None,
    ) -> None:
        path, ptx = _compiled(gpu, source, contracted)
        self._ptx = ptx if edit is None else edit(ptx)
        super().__init__(str(path))
        self.emulated = True  # its tensors are on the CPU
        self._seed, self._launches = seed, 0
        self._spans: list[Span] = []
        self._error: Exception | None = None
        self._taker = _Taker(self._take)

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if device.type == "cpu" and dtype in DTYPES else f"not {dtype} on {device}"

    def _launch(self, operation: str, launch: Launch, *args: Any) -> None:
        guard = next((arg for arg in args if isinstance(arg, Guard)), Guard())
        if launch.cache is None:
            self._plan(launch)
        if launch.cache.layouts_version != launch.cache.addresses.layouts_version:
            launch.cache.copy_layouts()
        self._spans = spans_of(launch, guard) + self._arenas(launch)
        self.library.ptx_set_taker(self._taker)
        try:
            super()._launch(operation, launch, *args)
        except RuntimeError:
            if self._error is not None:
                error, self._error = self._error, None
                raise error from None
            raise
        finally:
            self.library.ptx_set_taker(_Taker(0))

    def _arenas(self, launch: Launch) -> list[Span]:
        """Whole, as their padding is read; and the layouts on the device."""
        spans = []
        for number, arena in enumerate(dict.fromkeys(state.arena for state in launch.states)):
            for key in ("mean", "momentum", "hess", "grad_sum", "second_sum"):
                flat = getattr(arena, key)
                spans += [] if flat is None else [span_of(flat, f"{key} of arena {number}")]
        rows = launch.cache.rows_on_device.values()
        return spans + [span_of(row, "a layout", read_only=True) for row in rows]

    def _take(self, kernel: bytes, blocks: int, threads: int, shared: int, arguments: Any) -> int:
        try:
            self._execute(kernel.decode(), blocks, threads, shared, arguments)
        except Exception as error:  # a C function called this one
            self._error = error
            return 719  # cudaErrorLaunchFailure
        return 0

    def _execute(self, kernel: str, blocks: int, threads: int, shared: int, arguments: Any) -> None:
        code = program(self._ptx, kernel)
        if code.entry.threads != threads:
            raise PtxError(f"{threads} threads for a kernel of {code.entry.threads}")
        content = bytearray()
        for i, parameter in enumerate(code.entry.parameters.values()):
            content += bytes(parameter.offset - len(content)) + ctypes.string_at(arguments[i], parameter.size)
        self._launches += 1
        seed = None if self._seed is None else self._seed + self._launches
        code.run(blocks, bytes(content), Global(self._spans), shared=shared, threads=threads, seed=seed)


@functools.cache
def _backend(gpu: str, seed: int | None) -> PtxCudaBackend:
    return PtxCudaBackend(gpu, seed=seed)


def ptx_cuda(gpu: str = "sm_90", seed: int | None = None) -> PtxCudaBackend:
    """The backend; skips the test where there is no nvcc."""
    if NVCC is None or COMPILER is None:
        pytest.skip("no nvcc was found, which makes the PTX of backend cuda")
    return _backend(gpu, seed)
