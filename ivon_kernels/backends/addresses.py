"""Where parameters and gradients are in memory: arrays of addresses that the backends hand to their kernels.

Reading 128 fresh gradients takes Python longer than a GPU needs for the step of a LoRA model, so a small C library
(csrc/host) does it; where it is missing the same is done in Python, see :func:`unavailable`. Both give the same arrays,
flags and versions.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import operator
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ivon_kernels import _native

__all__ = [
    "CHANGED",
    "DTYPES",
    "IRREGULAR",
    "LAYOUT_WIDTH",
    "MAX_DIMS",
    "MISSING",
    "Addresses",
    "Versions",
    "unavailable",
]

MISSING = 1  # a gradient is None
IRREGULAR = 2  # a gradient that needs Tensor operations or set_grads first
CHANGED = 4  # within this file and csrc/host: an address or dtype is new

MAX_DIMS = 25  # of a layout row, as in csrc/cpu/ivon_cpu.h
LAYOUT_WIDTH = 1 + 3 * MAX_DIMS
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as every compiled backend numbers them

_ABI = 3
_RECORD_WIDTH = 7  # int64 fields of struct IvonHostRecord; sizes, strides and gradient strides follow

_GRAD_OF = operator.attrgetter("grad")
_DTYPE_OF = operator.attrgetter("dtype")
_DEVICE_OF = operator.attrgetter("device")
_SHAPE_OF = operator.attrgetter("shape")
_VERSION_OF = operator.attrgetter("_version")
_REQUIRES_GRAD_OF = operator.attrgetter("requires_grad")
# Under torch.set_default_device every attribute of a tensor is read through Python code of torch, 2 us each.
_in_function_mode = getattr(torch._C, "_is_torch_function_mode_enabled", lambda: False)


class _List(ctypes.Structure):
    """struct IvonHostList of csrc/host/gather.h."""

    _fields_ = (
        ("params", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("records", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("given", ctypes.c_void_p),
        ("grads", ctypes.c_void_p),
        ("grad_dtypes", ctypes.c_void_p),
    )


class _Objects(ctypes.Structure):
    """struct IvonHostObjects of csrc/host/gather.h."""

    _fields_ = tuple(
        (name, ctypes.py_object)
        for name in ("exchange_api", "tensor", "grad", "requires_grad", "version", "is_neg", "none", "yes")
    )


def _bind(path: str) -> ctypes.PyDLL:
    library = ctypes.PyDLL(path)  # keeps the GIL, which the C code needs to look at Python's objects
    if library.ivon_host_abi() != _ABI:
        raise OSError(f"{path} has ABI {library.ivon_host_abi()}, this package needs {_ABI}: reinstall ivon_kernels")
    library.ivon_host_init.argtypes, library.ivon_host_init.restype = [ctypes.POINTER(_Objects)], ctypes.c_char_p
    for name in ("record", "read_grads"):
        getattr(library, f"ivon_host_{name}").argtypes = [ctypes.c_void_p]
    library.ivon_host_moved.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.ivon_host_versions.argtypes, library.ivon_host_versions.restype = [ctypes.c_void_p], ctypes.c_int64
    return library


@functools.cache
def _load() -> tuple[ctypes.PyDLL | None, str | None]:
    """The native library, or why there is none."""
    api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if api is None:
        return None, f"torch {torch.__version__} has no DLPack exchange API; it came with torch 2.11"
    path = _native.find_library("host")
    if path is None:
        return None, _native.missing_reason("host")
    try:
        library = _bind(str(path))
    except OSError as error:
        return None, str(error)
    objects = _Objects(api, Tensor, Tensor.grad, Tensor.requires_grad, Tensor._version, Tensor.is_neg, None, True)
    reason: bytes | None = library.ivon_host_init(ctypes.byref(objects))
    return (library, None) if reason is None else (None, reason.decode())


def unavailable() -> str | None:
    """Why addresses are read in Python, which is slower and otherwise the same; None where C reads them."""
    return _load()[1]


def _no_function_mode() -> contextlib.AbstractContextManager[Any]:
    """What attributes of tensors are read under: no torch function mode comes between."""
    return torch._C.DisableTorchFunction() if _in_function_mode() else contextlib.nullcontext()


def _plain_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The strides, with 0 wherever a stride means nothing: a dimension of size 1, or fewer than two elements."""
    count = functools.reduce(operator.mul, shape, 1)
    if count < 2:
        return (0,) * len(strides)
    return tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= size
    return tuple(reversed(strides))


def _usual_grad_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """What autograd gives a gradient: its parameter's strides where these leave no gaps, else row-major ones."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size != 1):
        if stride != expected:
            return _row_major(shape)
        expected *= size
    return tuple(strides)


def _layout(shape: Sequence[int], strides: Sequence[int], grad_strides: Sequence[int]) -> array[int] | None:
    """Struct IvonLayout of a parameter and its gradient, or None where both are contiguous.

    Dimensions of size 1 are left out, and neighbours that both tensors walk as one dimension are merged.
    """
    dims: list[tuple[int, int, int]] = []
    for size, stride, grad_stride in zip(shape, strides, grad_strides, strict=True):
        if size == 0:
            return None
        if size == 1:
            continue
        if dims and dims[-1][1:] == (size * stride, size * grad_stride):
            size *= dims.pop()[0]
        dims.append((size, stride, grad_stride))
    if not dims or dims == [(dims[0][0], 1, 1)]:
        return None
    if len(dims) > MAX_DIMS:
        raise ValueError(f"a tensor with {len(dims)} strided dimensions; IVON takes up to {MAX_DIMS}")
    row = array("q", bytes(8 * LAYOUT_WIDTH))
    row[0] = len(dims)
    for part, values in enumerate(zip(*dims, strict=True)):
        begin = 1 + part * MAX_DIMS
        row[begin : begin + len(dims)] = array("q", values)
    return row


class _Seen(NamedTuple):
    """The parameters as they were when they were recorded."""

    shapes: list[torch.Size]
    strides: list[tuple[int, ...]]
    types: list[type]
    addresses: list[int]
    dtypes: list[torch.dtype]
    devices: list[torch.device]
    requires_grad: list[bool]


def _look(params: list[Tensor]) -> _Seen:
    return _Seen(
        list(map(_SHAPE_OF, params)),
        list(map(Tensor.stride, params)),
        list(map(type, params)),
        list(map(Tensor.data_ptr, params)),
        list(map(_DTYPE_OF, params)),
        list(map(_DEVICE_OF, params)),
        list(map(_REQUIRES_GRAD_OF, params)),
    )


def _plain_all(shapes: Iterable[Sequence[int]], strides: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
    return list(map(_plain_strides, shapes, strides))


def _addresses(objects: Sequence[object]) -> array[int]:
    """The addresses of Python objects, for C; the caller keeps the objects alive."""
    return array("q", map(id, objects))


def _write(column: array[int], values: list[int]) -> bool:
    """Overwrite a column; whether that changed it."""
    new = array("q", values)
    if new == column:
        return False
    column[:] = new
    return True


class Addresses:
    """Addresses of parameters and gradients, kept up to date.

    Args:
        params: Dense tensors of dtype float32, bfloat16 or float16 on one device.
        use_c: False reads them in Python also where the C library is there; for tests and benchmarks.

    Attributes:
        count: Number of parameters.
        params, grads: int64 ``[count]``: addresses; a gradient that is None, or has no elements, has address 0. Like
            all arrays here they are never reallocated, so that a kernel's table may keep pointing to them.
        grad_dtypes: int64 ``[count]``: 0 float32, 1 bfloat16, 2 float16.
        layouts: int64 ``[count]``: address of an IvonLayout row (csrc/cpu/ivon_cpu.h); 0: both contiguous.
        layout_rows: The rows, int64 ``[LAYOUT_WIDTH]``, or None.
        params_version, grads_version, layouts_version: Another number whenever the arrays' content may have changed.
        uses_c: Whether C reads the addresses.
    """

    def __init__(self, params: Sequence[Tensor], use_c: bool = True) -> None:
        self.count = len(params)
        self.params, self.grads, self.grad_dtypes, self.layouts = (array("q", bytes(8 * self.count)) for _ in range(4))
        self.layout_rows: list[array[int] | None] = [None] * self.count
        self.params_version = self.grads_version = self.layouts_version = 0
        self._tensors = list(params)
        self._grad_strides: list[tuple[int, ...]] = []
        self._layouts_of: _Seen | None = None
        self._kept: list[Tensor] = []  # copies that `grads` point to
        # C reads attributes past the type: a subclass with a `grad` of its own is left to Python.
        self._library = _load()[0] if use_c and all(map(_has_plain_attributes, set(map(type, params)))) else None
        self._objects = _addresses(self._tensors)
        self.record()

    @property
    def uses_c(self) -> bool:
        return self._library is not None

    def moved(self, *, trained: bool = True) -> bool:
        """Whether any parameter's address, shape, strides, dtype, device or type is another now.

        With `trained` also whether its requires_grad is.
        """
        if _in_function_mode():
            with torch._C.DisableTorchFunction():
                return self._moved(trained)
        return self._moved(trained)

    def record(self) -> None:
        """Note where the parameters are now; gradients are expected with the strides that autograd gives them."""
        with _no_function_mode():
            seen = self._seen = _look(self._tensors)
            self.params_version += _write(self.params, seen.addresses)
            self._records = array("q", bytes(8 * sum(_RECORD_WIDTH + 3 * len(shape) for shape in seen.shapes)))
            self._list = _List(
                self._objects.buffer_info()[0],
                self.count,
                self._records.buffer_info()[0],
                len(self._records),
                None,
                self.grads.buffer_info()[0],
                self.grad_dtypes.buffer_info()[0],
            )
            self._list_address = ctypes.addressof(self._list)
            if self._library is not None and self._library.ivon_host_record(self._list_address) != 0:
                self._library = None
        self._expect(list(map(_usual_grad_strides, seen.shapes, seen.strides)))

    def read_grads(self) -> int:
        """Read the gradient of every parameter.

        Returns:
            0, or MISSING where some are None (written as 0), or IRREGULAR where one is sparse, of another dtype or
            device, of a tensor subclass, a negative view, or strided in another way than the last `set_grads` or
            `record` had it. The arrays are then undefined: call `set_grads` with gradients made regular.
        """
        if _in_function_mode():
            with torch._C.DisableTorchFunction():
                flags = self._read_grads()
        else:
            flags = self._read_grads()
        if self._kept:
            self._kept = []
        if flags == 0:
            return 0
        if flags != MISSING:  # changed, or undefined
            self.grads_version += 1
        return flags & ~CHANGED

    def set_grads(self, grads: Sequence[Tensor | None]) -> None:
        """Write the given gradients and expect their strides from now on. The caller keeps them alive.

        Raises:
            TypeError: For a dtype that the kernels do not take.
            ValueError: For a gradient that is not dense, or on another device or of another shape than its parameter;
                or another number of gradients than of parameters.
        """
        with _no_function_mode():
            flags = self._read_grads(grads) if len(grads) == self.count else IRREGULAR
            if flags & (IRREGULAR | CHANGED):
                self.grads_version += 1
            self._kept = []
            if flags & IRREGULAR:
                self._set_each(grads)

    def _set_each(self, grads: Sequence[Tensor | None]) -> None:
        strides, addresses, dtypes = list(self._grad_strides), [0] * self.count, [0] * self.count
        places = zip(grads, self._seen.shapes, self._seen.devices, strict=True)
        for i, (grad, shape, device) in enumerate(places):
            if grad is None:
                continue
            _check_grad(grad, shape, device)
            if grad.is_neg():
                grad = grad.resolve_neg()
                self._kept.append(grad)
            addresses[i], dtypes[i], strides[i] = grad.data_ptr(), DTYPES[grad.dtype], grad.stride()
        self._write_grads(addresses, dtypes)
        self._expect(strides)

    def _write_grads(self, addresses: list[int], dtypes: list[int]) -> bool:
        # Both are written, whether or not the first has changed.
        return _write(self.grads, addresses) | _write(self.grad_dtypes, dtypes)

    def _expect(self, grad_strides: list[tuple[int, ...]]) -> None:
        """Record the strides that gradients have, and the layouts that follow from them."""
        if self._grad_strides == grad_strides and self._layouts_of is self._seen:
            return
        self._grad_strides, self._layouts_of = grad_strides, self._seen
        begin = _RECORD_WIDTH
        for shape, strides in zip(self._seen.shapes, grad_strides, strict=True):
            dims = len(shape)
            self._records[begin + 2 * dims : begin + 3 * dims] = array("q", strides)
            begin += _RECORD_WIDTH + 3 * dims
        rows = list(map(_layout, self._seen.shapes, self._seen.strides, grad_strides))
        if rows != self.layout_rows:
            self.layout_rows = rows
            self.layouts[:] = array("q", [0 if row is None else row.buffer_info()[0] for row in rows])
            self.layouts_version += 1

    def _moved(self, trained: bool) -> bool:
        if self._library is not None:
            return bool(self._library.ivon_host_moved(self._list_address, trained))
        seen = self._seen
        try:
            now = _look(self._tensors)
        except RuntimeError:  # no longer dense
            return True
        if not trained:
            now = now._replace(requires_grad=seen.requires_grad)
        if now == seen:
            return False
        same = now[0] == seen[0] and now[2:] == seen[2:]
        return not same or _plain_all(now.shapes, now.strides) != _plain_all(seen.shapes, seen.strides)

    def _read_grads(self, given: Sequence[Tensor | None] | None = None) -> int:
        if self._library is None:
            return self._read_in_python(list(map(_GRAD_OF, self._tensors)) if given is None else list(given))
        objects = None if given is None else _addresses(given)
        self._list.given = None if objects is None else objects.buffer_info()[0]
        return int(self._library.ivon_host_read_grads(self._list_address))

    def _read_in_python(self, grads: list[Tensor | None]) -> int:
        present = [grad for grad in grads if grad is not None]
        places: Sequence[int] = range(self.count)
        if len(present) != self.count:
            places = [i for i, grad in enumerate(grads) if grad is not None]
        if not set(map(type, present)) <= {Tensor}:
            return IRREGULAR
        try:
            read = list(map(Tensor.data_ptr, present))
            dtypes_read = list(map(DTYPES.__getitem__, map(_DTYPE_OF, present)))
            regular = self._regular(present, read, places)
        except (RuntimeError, KeyError):  # without strides or storage; of another dtype
            return IRREGULAR
        if not regular:
            return IRREGULAR
        addresses, dtypes = [0] * self.count, [0] * self.count
        for i, address, dtype in zip(places, read, dtypes_read, strict=True):
            addresses[i], dtypes[i] = address, dtype
        changed = self._write_grads(addresses, dtypes)
        return (CHANGED if changed else 0) | (MISSING if len(present) != self.count else 0)

    def _regular(self, grads: list[Tensor], addresses: list[int], places: Sequence[int]) -> bool:
        """Whether the gradients of the parameters at `places` are what the kernels take as they are."""
        shapes, devices = [self._seen.shapes[i] for i in places], [self._seen.devices[i] for i in places]
        if list(map(_SHAPE_OF, grads)) != shapes or list(map(_DEVICE_OF, grads)) != devices:
            return False
        if 0 in addresses and not all(address or 0 in shape for address, shape in zip(addresses, shapes, strict=True)):
            return False
        expected, strides = [self._grad_strides[i] for i in places], list(map(Tensor.stride, grads))
        same_strides = strides == expected or _plain_all(shapes, strides) == _plain_all(shapes, expected)
        return same_strides and not any(map(Tensor.is_neg, grads))


class Versions:
    """Tells whether somebody has written one of many tensors.

    Args:
        tensors: Of which autograd counts writes: not made in inference mode.
        use_c: As for :class:`Addresses`.
    """

    def __init__(self, tensors: Sequence[Tensor], use_c: bool = True) -> None:
        self._tensors = list(tensors)
        self._library = _load()[0] if use_c else None
        self._objects = _addresses(self._tensors)
        self._list = _List(self._objects.buffer_info()[0], len(self._tensors))
        self._list_address = ctypes.addressof(self._list)

    def total(self) -> int:
        """Another number once one of them was written."""
        if self._library is not None:
            return int(self._library.ivon_host_versions(self._list_address))
        with _no_function_mode():
            return sum(map(_VERSION_OF, self._tensors))


def _has_plain_attributes(kind: type) -> bool:
    """Whether a tensor type leaves torch's own attributes as they are, which C reads past the type."""
    names = ("grad", "requires_grad")
    return issubclass(kind, Tensor) and all(getattr(kind, name) is getattr(Tensor, name) for name in names)


def _check_grad(grad: Tensor, shape: torch.Size, device: torch.device) -> None:
    if grad.layout is not torch.strided:
        raise ValueError(f"a gradient has layout {grad.layout}; the kernels take dense ones only")
    if grad.dtype not in DTYPES:
        raise TypeError(f"a gradient has dtype {grad.dtype}; the kernels take {', '.join(map(str, DTYPES))}")
    if grad.shape != shape or grad.device != device:
        raise ValueError(
            f"a gradient has shape {tuple(grad.shape)} on {grad.device}, its parameter {tuple(shape)} on {device}"
        )
