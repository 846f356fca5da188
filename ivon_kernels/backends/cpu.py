"""The C++ backend (csrc/cpu): one call walks all tensors, OpenMP over the whole list, SIMD chosen at run time."""

from __future__ import annotations

import ctypes
import functools
import os
from array import array

import torch

from ivon_kernels import _native
from ivon_kernels.backends.addresses import DTYPES
from ivon_kernels.backends.base import Backend, Draw, Launch
from ivon_kernels.noise import Shard

_ABI = 4
SIMD_VARIABLE = "IVON_KERNELS_SIMD"
SIMD_LEVELS = ("avx512", "avx2", "baseline", "neon")

# Columns of the tensor table, as in struct IvonTensor of csrc/cpu/ivon_cpu.h; each call fills in the last ones itself.
_COLUMNS = (
    *("mean", "momentum", "hess", "grad_sum", "second_sum", "noise", "noise_tag", "step_count"),
    *("numel", "index", "row", "param_dtype", "start", "run", "pitch"),
    *("param", "grad", "layout", "grad_dtype", "step", "scalars"),
)
_WIDTH = len(_COLUMNS)


class _Call(ctypes.Structure):
    """struct IvonCall of csrc/cpu/ivon_cpu.h."""

    _fields_ = (
        ("tensors", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("params", ctypes.c_void_p),
        ("grads", ctypes.c_void_p),
        ("grad_dtypes", ctypes.c_void_p),
        ("layouts", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        ("step_override", ctypes.c_int64),
        ("sample", ctypes.c_int64),
        ("replica", ctypes.c_int64),
        ("adopt", ctypes.c_int64),
        ("draw_next", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("scalars", ctypes.c_void_p),
    )


def _bind(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    if library.ivon_cpu_abi() != _ABI:
        raise OSError(f"{path} has ABI {library.ivon_cpu_abi()}, this package needs {_ABI}: reinstall ivon_kernels")
    library.ivon_cpu_simd.restype = ctypes.c_char_p
    library.ivon_cpu_set_simd.argtypes = [ctypes.c_char_p]
    i64 = ctypes.c_int64
    library.ivon_cpu_normals.argtypes = [ctypes.c_void_p, i64, ctypes.c_uint64, i64, i64, i64, i64, i64, i64]
    library.ivon_cpu_normals.restype = None
    for name in ("sample", "restore", "accumulate", "step"):
        function = getattr(library, f"ivon_cpu_{name}")
        function.argtypes, function.restype = [ctypes.POINTER(_Call)], None
    library.ivon_cpu_find_nonfinite.argtypes = [ctypes.POINTER(_Call)]
    library.ivon_cpu_find_nonfinite.restype = i64
    library.ivon_cpu_lora.argtypes, library.ivon_cpu_lora.restype = [ctypes.c_void_p], None
    return library


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The native library, or why there is none."""
    path = _native.find_library("cpu")
    if path is None:
        return None, _native.missing_reason("cpu")
    try:
        library = _bind(str(path))
    except OSError as error:
        return None, str(error)
    wanted = os.environ.get(SIMD_VARIABLE)
    if wanted and library.ivon_cpu_set_simd(wanted.encode()) != 0:
        return None, f"{SIMD_VARIABLE}={wanted}: not one of the levels of this processor and build"
    return library, None


def missing() -> str | None:
    """Why there is no native library, or None."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """The native library.

    Raises:
        RuntimeError: If there is none.
    """
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(f"the cpu backend is missing: {reason}")
    return loaded


def simd_level() -> str:
    """The SIMD level in use: ``"avx512"``, ``"avx2"``, ``"baseline"`` or ``"neon"``."""
    level: bytes = library().ivon_cpu_simd()
    return level.decode()


def set_simd_level(level: str) -> None:
    """Use another SIMD level from now on, in the whole process; results do not depend on it.

    Raises:
        ValueError: If it was not built or the processor lacks it.
    """
    if library().ivon_cpu_set_simd(level.encode()) != 0:
        raise ValueError(f"SIMD level {level!r} is not available here; there are {simd_levels()}")


def simd_levels() -> list[str]:
    """The SIMD levels that were built and that this processor has, widest first."""
    current = simd_level()
    levels = [level for level in SIMD_LEVELS if library().ivon_cpu_set_simd(level.encode()) == 0]
    library().ivon_cpu_set_simd(current.encode())
    return levels


def normals(
    numel: int,
    *,
    seed: int,
    step: int,
    sample: int = 0,
    replica: int = 0,
    param: int = 0,
    start: int = 0,
    threads: int | None = None,
) -> torch.Tensor:
    """The C++ twin of :func:`ivon_kernels.noise.normals` (same arguments, same bits), for tests and benchmarks."""
    out = torch.empty(numel, dtype=torch.float32, device="cpu")
    threads = torch.get_num_threads() if threads is None else threads
    library().ivon_cpu_normals(out.data_ptr(), numel, seed, step, sample, replica, param, start, threads)
    return out


class _Table:
    """The tensor table of one state list, and the call that refers to it. What cannot change is written once."""

    def __init__(self, launch: Launch) -> None:
        self.states = launch.states
        self.rows = array("q", bytes(8 * _WIDTH * len(self.states)))
        self.summed = False
        self.arenas = {state.arena for state in self.states}
        self.offsets = [state.arena.offsets[state.position] * state.mean.element_size() for state in self.states]
        for key in ("mean", "momentum", "hess"):
            self.set(key, [getattr(state, key).data_ptr() for state in self.states])
        self.set("noise", [0 if state.noise is None else state.noise.data_ptr() for state in self.states])
        self.set("noise_tag", [state.arena.noise_tags[state.position].data_ptr() for state in self.states])
        self.set("step_count", [state.arena.steps[state.position].data_ptr() for state in self.states])
        self.set("numel", [state.param.numel() for state in self.states])
        self.set("index", [state.index for state in self.states])
        self.set("row", [state.group for state in self.states])
        self.set("param_dtype", [DTYPES[state.param.dtype] for state in self.states])
        for column in Shard._fields:
            self.set(column, [getattr(state.placement, column) for state in self.states])
        addresses = launch.addresses
        assert addresses is not None
        self.call = _Call(tensors=self.rows.buffer_info()[0], count=len(self.states))
        for key in ("params", "grads", "grad_dtypes", "layouts"):
            setattr(self.call, key, getattr(addresses, key).buffer_info()[0])

    def set(self, column: str, values: list[int]) -> None:
        self.rows[_COLUMNS.index(column) :: _WIDTH] = array("q", values)

    def set_sums(self, summed: bool) -> None:
        """Point to the sums of earlier MC samples, or to nothing."""
        if not summed and not self.summed:
            return
        self.summed = summed
        for column in ("grad_sum", "second_sum"):
            totals = {arena: getattr(arena, column) for arena in self.arenas}
            starts = {arena: 0 if total is None else total.data_ptr() for arena, total in totals.items()}
            # By arithmetic: a view of every tensor's part would take longer than the launch.
            addresses = [
                starts[state.arena] + offset if state.summed else 0
                for state, offset in zip(self.states, self.offsets, strict=True)
            ]
            self.set(column, addresses)


class CpuBackend(Backend):
    """C++ with OpenMP and SIMD for CPU tensors: float32, bfloat16 and float16 parameters and gradients."""

    name = "cpu"
    keeps_noise = True  # on the CPU the normals cost more than the memory traffic

    def unavailable(self) -> str | None:
        return missing()

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cpu":
            return f"it takes tensors on the CPU, not on {device}"
        if dtype not in DTYPES:
            return f"it takes {', '.join(str(d) for d in DTYPES)}, not {dtype}"
        return None

    def sample(self, launch: Launch, draw: Draw, adopt: bool) -> None:
        self._launch("sample", launch, draw, adopt)

    def restore(self, launch: Launch) -> None:
        self._launch("restore", launch)

    def find_nonfinite(self, launch: Launch) -> int | None:
        position = self._launch("find_nonfinite", launch)
        return None if position < 0 else position

    def accumulate(self, launch: Launch, draw: Draw) -> None:
        self._launch("accumulate", launch, draw)

    def step(self, launch: Launch, draw: Draw, adopt: bool, draw_next: bool) -> None:
        self._launch("step", launch, draw, adopt, draw_next)

    @staticmethod
    def _launch(
        operation: str, launch: Launch, draw: Draw | None = None, adopt: bool = False, draw_next: bool = False
    ) -> int:
        table: _Table = launch.cache or launch.derive(_Table)
        call = table.call
        call.rows = None
        if draw is not None:
            call.rows = launch.scalars.address
            call.seed, call.sample, call.replica = draw.seed, draw.sample, draw.replica
            call.step_override = -1 if draw.step is None else draw.step
            table.set_sums(launch.summed)
        call.adopt, call.draw_next, call.threads = adopt, draw_next, torch.get_num_threads()
        result: int | None = getattr(library(), f"ivon_cpu_{operation}")(ctypes.byref(call))
        return -1 if result is None else result
