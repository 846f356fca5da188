"""The CUDA C++ backend (csrc/cuda): one launch for all tensors, made by C from addresses that C has read.

A launch's arguments hold all that it needs by value: nothing is copied to the device, and captured graphs replay.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from array import array
from typing import Any

import torch
from torch import Tensor

from ivon_kernels import _native
from ivon_kernels.backends.addresses import DTYPES, Addresses
from ivon_kernels.backends.base import Draw, Guard, Launch
from ivon_kernels.backends.device import DeviceBackend
from ivon_kernels.backends.state import ParamState

_ABI = 2
_CAPABILITY = (8, 0)  # of the oldest device that the library is compiled for
_OPERATIONS = ("sample", "restore", "check", "accumulate", "step")
_ALONE = Guard()
_NO_DRAW = Draw(0, 0)


class _Call(ctypes.Structure):
    """struct IvonCudaCall of csrc/cuda/ivon_cuda.h."""

    _fields_ = (
        ("stream", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("step_override", "sample", "replica")),
        *((name, ctypes.c_int64) for name in ("adopt", "draw_next", "final", "report")),
        *((name, ctypes.c_void_p) for name in ("found_inf", "grad_scale", "rows")),
        *((name, ctypes.c_void_p) for name in ("params", "grads", "grad_dtypes", "layouts", "summed")),
        *((name, ctypes.c_void_p) for name in ("grad_sum", "second_sum", "mean", "momentum", "hess", "steps")),
        *((name, ctypes.c_void_p) for name in ("control", "mailbox", "tensors")),
        ("count", ctypes.c_int64),
        ("device", ctypes.c_int64),
    )


# The fields before `params`, which every call writes.
_CHANGING = struct.Struct("=QQ7q3Q")


def _bind(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    if library.ivon_cuda_abi() != _ABI:
        raise OSError(f"{path} has ABI {library.ivon_cuda_abi()}, this package needs {_ABI}: reinstall ivon_kernels")
    i64 = ctypes.c_int64
    library.ivon_cuda_error_string.restype = ctypes.c_char_p
    library.ivon_cuda_versions.argtypes, library.ivon_cuda_versions.restype = [ctypes.POINTER(i64)] * 2, None
    library.ivon_cuda_load.argtypes = [i64]
    library.ivon_cuda_launches.restype = i64
    library.ivon_cuda_set_limits.argtypes, library.ivon_cuda_set_limits.restype = [i64, i64, i64], None
    library.ivon_cuda_set_stub.argtypes, library.ivon_cuda_set_stub.restype = [ctypes.c_int], None
    library.ivon_cuda_normals.argtypes = [
        *(ctypes.c_void_p, i64, ctypes.c_uint64, i64, i64, i64, i64, i64, i64, ctypes.c_void_p)
    ]
    for operation in _OPERATIONS:
        getattr(library, f"ivon_cuda_{operation}").argtypes = [ctypes.c_void_p]
    return library


@functools.cache
def _load(path: str | None) -> tuple[ctypes.CDLL | None, str | None]:
    """The library at a path, or the one that was built with the package; or why there is none."""
    if path is None:
        found = _native.find_library("cuda")
        if found is None:
            return None, _native.missing_reason("cuda")
        path = str(found)
    try:
        return _bind(path), None
    except OSError as error:
        return None, str(error)


def _too_old(library: ctypes.CDLL) -> str | None:
    """Why the driver does not run the library, which brings a CUDA runtime of its own; or None."""
    built, driver = ctypes.c_int64(), ctypes.c_int64()
    library.ivon_cuda_versions(ctypes.byref(built), ctypes.byref(driver))
    if driver.value // 1000 >= built.value // 1000:  # minor versions are compatible
        return None
    versions = [f"{version // 1000}.{version % 1000 // 10}" for version in (built.value, driver.value)]
    return f"it was built with CUDA {versions[0]}, but this driver goes to {versions[1]}; update the driver"


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Part:
    """The states of one launch that lie in one arena: struct IvonCudaCall, and what it points to."""

    def __init__(self, members: list[tuple[int, ParamState]], addresses: Addresses, device: int) -> None:
        arena = members[0][1].arena
        assert arena.flags is not None
        self.arena = arena
        self.tensors = array("q")
        for number, state in members:
            self.tensors.extend((number, arena.offsets[state.position], state.param.numel(), state.index))
            self.tensors.extend((state.position, state.group, DTYPES[state.param.dtype], *state.placement))
        self.call = _Call(
            params=addresses.params.buffer_info()[0],
            grads=addresses.grads.buffer_info()[0],
            grad_dtypes=addresses.grad_dtypes.buffer_info()[0],
            mean=arena.mean.data_ptr(),
            momentum=arena.momentum.data_ptr(),
            hess=arena.hess.data_ptr(),
            steps=arena.steps.data_ptr(),
            control=arena.flags.block.data_ptr(),
            mailbox=arena.flags.mailbox.data_ptr(),
            tensors=self.tensors.buffer_info()[0],
            count=len(members),
            device=device,
        )
        self.address = ctypes.addressof(self.call)
        self.sums: Tensor | None = None  # the arena's, which may come later


class _Plan:
    """What the backend keeps for one launch."""

    def __init__(self, launch: Launch) -> None:
        assert launch.addresses is not None
        self.states = launch.states
        self.addresses = launch.addresses
        self.device = self.states[0].mean.device
        self.index = -1 if self.device.type == "cpu" else self.device.index
        members: dict[int, list[tuple[int, ParamState]]] = {}
        for number, state in enumerate(self.states):
            members.setdefault(id(state.arena), []).append((number, state))
        self.parts = [_Part(part, self.addresses, self.index) for part in members.values()]
        self.layouts_version = -1
        self.layouts = array("q", bytes(8 * len(self.states)))
        self.rows_on_device: dict[bytes, Tensor] = {}  # of all layouts met: captured graphs point to them
        self.summed = array("B")
        self.had_sums = False

    def copy_layouts(self) -> None:
        """Bring the strides of tensors that are not contiguous to the device: once, and again when they change."""
        self.layouts_version = self.addresses.layouts_version
        for number, row in enumerate(self.addresses.layout_rows):
            if row is None:
                self.layouts[number] = 0
                continue
            key = row.tobytes()
            if key not in self.rows_on_device:
                self.rows_on_device[key] = torch.tensor(row.tolist(), dtype=torch.int64, device=self.device)
            self.layouts[number] = self.rows_on_device[key].data_ptr()
        for part in self.parts:
            part.call.layouts = self.layouts.buffer_info()[0]

    def point_to_sums(self) -> None:
        """Point to the arenas' sums of earlier MC samples, where there are any."""
        for part in self.parts:
            arena = part.arena
            if part.sums is not arena.grad_sum:
                part.sums = arena.grad_sum
                part.call.grad_sum, part.call.second_sum = _address(arena.grad_sum), _address(arena.second_sum)

    def note_summed(self, summed: bool) -> None:
        """Note which states' sums the step adds."""
        if not summed and not self.had_sums:
            return
        self.had_sums = summed
        self.point_to_sums()
        self.summed = array("B", [state.summed for state in self.states])
        address = self.summed.buffer_info()[0] if summed else None
        for part in self.parts:
            part.call.summed = address


class CudaBackend(DeviceBackend):
    """CUDA C++ for NVIDIA GPUs: float32, bfloat16 and float16 parameters and gradients.

    Args:
        library: Path of another library than the one built with the package, for tests: perhaps one that emulates the
            device on the CPU.
    """

    name = "cuda"

    def __init__(self, library: str | None = None) -> None:
        self._path = library
        self._functions: dict[str, Any] = {}
        self._loaded: set[int] = set()
        self.emulated = False

    @property
    def library(self) -> ctypes.CDLL:
        """The C ABI of csrc/cuda/ivon_cuda.h."""
        library, reason = _load(self._path)
        if library is None:
            raise RuntimeError(f"the cuda backend is missing: {reason}")
        return library

    def unavailable(self) -> str | None:
        library, reason = _load(self._path)
        if library is None:
            return reason
        self.emulated = bool(library.ivon_cuda_emulated())
        if self.emulated:
            return None
        if torch.version.cuda is None:
            return "this torch was built without CUDA"
        return _too_old(library) if torch.cuda.is_available() else "there is no CUDA device"

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        wanted = "cpu" if self.emulated else "cuda"
        if device.type != wanted:
            return f"it takes tensors on {'the CPU (emulator)' if self.emulated else 'CUDA devices'}, not on {device}"
        if dtype not in DTYPES:
            return f"it takes {', '.join(str(d) for d in DTYPES)}, not {dtype}"
        if not self.emulated and torch.cuda.get_device_capability(device) < _CAPABILITY:
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
        return None

    def sample(self, launch: Launch, draw: Draw, adopt: bool) -> None:
        self._launch("sample", launch, draw, adopt)

    def restore(self, launch: Launch) -> None:
        self._launch("restore", launch)

    def check(self, launch: Launch) -> None:
        self._launch("check", launch)

    def accumulate(self, launch: Launch, draw: Draw) -> None:
        self._launch("accumulate", launch, draw)

    def step(self, launch: Launch, draw: Draw, adopt: bool, draw_next: bool, guard: Guard | None = None) -> None:
        self._launch("step", launch, draw, adopt, draw_next, guard or _ALONE)

    def _launch(
        self,
        operation: str,
        launch: Launch,
        draw: Draw = _NO_DRAW,
        adopt: bool = False,
        draw_next: bool = False,
        guard: Guard = _ALONE,
    ) -> None:
        plan: _Plan = launch.cache or self._plan(launch)
        if plan.layouts_version != plan.addresses.layouts_version:
            plan.copy_layouts()
        if operation == "step":
            plan.note_summed(launch.summed)
        elif operation == "accumulate":
            plan.point_to_sums()
        if plan.index >= 0 and torch._C._cuda_getDevice() != plan.index:
            with torch.cuda.device(plan.index):  # the library makes it current: torch has to know, and to go back
                self._run(plan, operation, launch, draw, adopt, draw_next, guard)
        else:
            self._run(plan, operation, launch, draw, adopt, draw_next, guard)

    def _run(
        self, plan: _Plan, operation: str, launch: Launch, draw: Draw, adopt: bool, draw_next: bool, guard: Guard
    ) -> None:
        """Launch on the current device."""
        stream = 0 if plan.index < 0 else torch._C._cuda_getCurrentRawStream(plan.index)
        last = plan.parts[-1]
        function = self._functions[operation]
        for part in plan.parts:
            _CHANGING.pack_into(
                part.call,
                0,
                stream,
                draw.seed,
                -1 if draw.step is None else draw.step,
                draw.sample,
                draw.replica,
                adopt,
                draw_next,
                guard.final and part is last,
                guard.report,
                _address(guard.found_inf),
                _address(guard.grad_scale),
                launch.scalars.address,
            )
            code = function(part.address)
            if code:  # of the launch itself; what a kernel does wrong shows at the next synchronization
                self._fail(operation, plan.device, code)

    def _plan(self, launch: Launch) -> _Plan:
        plan = launch.derive(_Plan)
        library = self.library
        if not self._functions:
            self._functions = {name: getattr(library, f"ivon_cuda_{name}") for name in _OPERATIONS}
        if plan.index not in self._loaded:
            with torch.cuda.device(plan.index):  # nothing where it is -1
                code = library.ivon_cuda_load(plan.index)
            if code:
                self._fail("loading the kernels", plan.device, code)
            self._loaded.add(plan.index)
        return plan

    def _fail(self, operation: str, device: torch.device, code: int) -> None:
        text = self.library.ivon_cuda_error_string(code).decode()
        raise RuntimeError(f"the cuda backend failed at {operation} on {device}: {text} (error {code})")
