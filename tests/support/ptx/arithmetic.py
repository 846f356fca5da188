"""What PTX's instructions compute, on NumPy: one array per operand, one element per thread.

Exact: integers, ``add``, ``sub``, ``mul``, ``div``, ``rcp`` and ``sqrt`` with ``.rn``, ``fma.rn``, comparisons and
conversions. NumPy rounds these as IEEE 754 asks, and so does a GPU; only the bits of a NaN may differ. Not exact:
``ex2``, ``lg2``, ``sin``, ``cos``, ``rsqrt`` and everything else ``.approx`` or ``.full``, which is within a few units
of the last place on a GPU, and one unit off here.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx.text import PtxError

Array = NDArray[Any]
Function = Callable[..., Array]

DTYPES = {f"{kind}{8 * size}": np.dtype(f"u{size}") for kind in "bu" for size in (1, 2, 4, 8)}
DTYPES |= {f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)}
DTYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "bf16": np.dtype("u2")}
DTYPES |= {"pred": np.dtype(bool), "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4")}
_SPECIFIC = ("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "ftz", "sat", "approx", "full", "lo", "hi", "wide")
_WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def _shift(left: bool) -> Callable[[Array, Array], Array]:
    """Shifts by more than the width give 0, or the sign."""

    def shift(value: Array, count: Array) -> Array:
        width = 8 * value.itemsize
        inside = np.minimum(count, width - 1).astype(value.dtype)
        if left:
            return np.where(count < width, value << inside, 0).astype(value.dtype)
        if value.dtype.kind == "i":
            return value >> inside
        return np.where(count < width, value >> inside, 0).astype(value.dtype)

    return shift


def _remainder(a: Array, b: Array) -> Array:
    """Remainder with the sign of the dividend."""
    return a - _divide(a, b) * b


def _divide(a: Array, b: Array) -> Array:
    """Of integers, towards zero; what hardware gives for 0 is nothing to rely on."""
    if (b == 0).any():
        raise PtxError("a division by zero")
    if a.dtype.kind == "u":
        return a // b
    quotient = a // b
    return quotient + ((quotient * b != a) & ((a < 0) != (b < 0)))


def _high_product(a: Array, b: Array) -> Array:
    if a.itemsize == 8:
        return np.array([(int(x) * int(y)) >> 64 for x, y in np.broadcast(a, b)], dtype=object).astype(a.dtype)
    wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
    return ((a.astype(wide) * b.astype(wide)) >> (8 * a.itemsize)).astype(a.dtype)


def _wide_product(a: Array, b: Array) -> Array:
    wide = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
    return a.astype(wide) * b.astype(wide)


def fused(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c``, rounded once.

    Of float32: the product is exact in float64; the sum is rounded there to odd, after which rounding to float32 is
    right. Of float64: the C library's.
    """
    a, b, c = np.broadcast_arrays(a, b, c)
    if a.dtype == np.float64:
        return np.fromiter(map(_fma(), a.tolist(), b.tolist(), c.tolist()), dtype=np.float64, count=a.size)
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    back = total - product  # the error of the sum, exactly (Knuth)
    error = (product - (total - back)) + (addend - back)
    bits = total.view(np.int64)
    even = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(even, bits + towards, bits).view(np.float64).astype(a.dtype)


@functools.cache
def _fma() -> Callable[[float, float, float], float]:
    function = ctypes.CDLL(ctypes.util.find_library("m")).fma
    function.argtypes, function.restype = [ctypes.c_double] * 3, ctypes.c_double
    return function  # type: ignore[no-any-return]


def flushed(value: Array) -> Array:
    """Float32 with subnormal numbers as zeros of their sign."""
    return np.where(np.abs(value) < np.float32(2.0**-126), np.copysign(np.float32(0), value), value)


def _minimum(a: Array, b: Array) -> Array:
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)


def _maximum(a: Array, b: Array) -> Array:
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


def extract_field(a: Array, begin: Array, length: Array) -> Array:
    """``bfe``: a field of bits, with the sign of its highest bit if the type has one."""
    width = 8 * a.itemsize
    signed = a.dtype.kind == "i"
    begin, length = (begin & 255).astype(np.int64), (length & 255).astype(np.int64)
    shifted = a.astype(object) >> begin.astype(object) if width == 64 else a.astype(np.int64) >> np.minimum(begin, 63)
    shifted = shifted.astype(np.int64)
    length = np.minimum(length, width - np.minimum(begin, width - 1)) if signed else length
    rest = np.clip(64 - length, 0, 63)
    moved = shifted << rest
    field = moved >> rest if signed else (moved.astype(np.uint64) >> rest.astype(np.uint64)).astype(np.int64)
    return np.where(length == 0, 0, field).astype(a.dtype)


def insert_field(a: Array, b: Array, begin: Array, length: Array) -> Array:
    """``bfi``: the low bits of `a` into `b`."""
    width = 8 * b.itemsize
    ones = np.where(length >= width, ~np.zeros_like(b), (np.ones_like(b) << np.minimum(length, width - 1)) - 1)
    mask = (ones << np.minimum(begin, width - 1)).astype(b.dtype)
    return (b & ~mask) | ((a << np.minimum(begin, width - 1)).astype(b.dtype) & mask)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """``prmt``: each byte of the result is one of the eight of `a` and `b`, or its sign repeated."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((choice & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
        byte = np.where(choice & np.uint32(8) != 0, np.where(byte & np.uint32(128) != 0, 255, 0), byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def logical_table(a: Array, b: Array, c: Array, table: Array) -> Array:
    """``lop3``: any function of three bits."""
    number, result = int(table.flat[0]), np.zeros_like(a)
    for i in range(8):
        if number >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def funnel(left: bool, clamp: bool) -> Callable[[Array, Array, Array], Array]:
    """``shf``: 32 of the 64 bits of two registers."""

    def shift(low: Array, high: Array, count: Array) -> Array:
        by = (np.minimum(count, 32) if clamp else count & 31).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low
        return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)

    return shift


_BITS = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
_PLAIN: dict[str, Function] = {
    **_BITS,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "abs": np.abs,
    "min": _minimum,
    "max": _maximum,
    "shl": _shift(True),
    "shr": _shift(False),
    "fma": fused,
    "sqrt": np.sqrt,
    "rcp": lambda a: 1 / a,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "bfe": extract_field,
    "bfi": insert_field,
    "prmt": permute_bytes,
    "lop3": logical_table,
    "popc": lambda a: np.bitwise_count(a).astype(np.uint32),
    "brev": lambda a: np.array([int(f"{int(x):032b}"[::-1], 2) for x in a], dtype=a.dtype),
    "clz": lambda a: (8 * a.itemsize - np.array([int(x).bit_length() for x in a])).astype(np.uint32),
    "cnot": lambda a: (a == 0).astype(a.dtype),
}


def function_of(opcode: str, modifiers: tuple[str, ...]) -> tuple[Function, list[str], str]:
    """What computes an instruction: a function, the types of its operands, the last one for all that follow, and its
    result's.

    Raises:
        PtxError: If nothing here does.
    """
    known = [m for m in modifiers if m in DTYPES]
    rest = [m for m in modifiers if m not in DTYPES and m not in _SPECIFIC]
    kind = known[-1] if known else ""
    if (
        (rest and not (opcode == "shf" and rest[0] in ("l", "r")))
        or not kind
        or kind.endswith("x2")
        or kind in ("f16", "bf16")
    ):
        raise PtxError(f"an unknown instruction: {'.'.join((opcode, *modifiers))}")
    operand, result = [kind], kind
    if opcode == "mul" and "hi" in modifiers:
        function: Function = _high_product
    elif opcode == "mul" and "wide" in modifiers:
        function, result = _wide_product, _WIDER[kind]
    elif opcode == "mad":
        operand, function, result = _multiply_add(kind, modifiers)
    elif opcode == "div":
        function = np.divide if kind[0] == "f" else _divide
    elif opcode == "rem":
        function = _remainder
    elif opcode in ("shl", "shr"):
        function, operand = _PLAIN[opcode], [kind, "u32"]
    elif opcode in ("bfe", "bfi"):
        function, operand = _PLAIN[opcode], [kind] * (2 if opcode == "bfi" else 1) + ["u32"]
    elif opcode == "shf":
        function = funnel(modifiers[0] == "l", "clamp" in modifiers)
    elif opcode in ("popc", "clz"):
        function, result = _PLAIN[opcode], "u32"
    elif opcode in _PLAIN:
        function = _PLAIN[opcode]
    else:
        raise PtxError(f"an unknown instruction: {'.'.join((opcode, *modifiers))}")
    if kind == "f32" and {"rz", "rm", "rp"} & set(modifiers):
        raise PtxError(f"an unknown rounding: {'.'.join((opcode, *modifiers))}")
    return _modified(function, modifiers), operand, result


def _multiply_add(kind: str, modifiers: tuple[str, ...]) -> tuple[list[str], Function, str]:
    if kind[0] == "f":
        return [kind], fused, kind
    if "wide" in modifiers:
        wide = _WIDER[kind]
        return [kind, kind, wide], lambda a, b, c: _wide_product(a, b) + c, wide
    product = _high_product if "hi" in modifiers else np.multiply
    return [kind], lambda a, b, c: product(a, b) + c, kind


def _modified(function: Function, modifiers: tuple[str, ...]) -> Function:
    """With flushes to zero and saturation."""
    if "ftz" in modifiers:
        inner = function
        function = lambda *values: flushed(inner(*map(flushed, values)))  # noqa: E731
    if {"approx", "full"} & set(modifiers):
        exact = function
        function = lambda *values: _nearby(exact(*values))  # noqa: E731
    if "sat" in modifiers:
        unsaturated = function
        function = lambda *values: np.fmax(np.float32(0), np.fmin(np.float32(1), unsaturated(*values)))  # noqa: E731
    return function


def _nearby(value: Array) -> Array:
    """Not the exact result but a neighbour of it, so that no bit of it can be relied on."""
    bits = value.view(f"u{value.itemsize}")
    return np.where(np.isfinite(value) & (value != 0), bits ^ 1, bits).astype(bits.dtype).view(value.dtype)


_UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}
_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
_COMPARE |= {"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def comparison(name: str, kind: str) -> Function:
    """``setp``'s; with NaN the ordered ones are false and the unordered ones are true."""
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name in _UNORDERED:
        ordered = _COMPARE[_UNORDERED[name]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    if name == "ne" and kind[0] == "f":
        return lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    if name not in _COMPARE:
        raise PtxError(f"an unknown comparison: setp.{name}")
    return _COMPARE[name]


def to_bfloat16(value: Array) -> Array:
    """Float32 to the bits of bfloat16, to nearest even."""
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def conversion(modifiers: tuple[str, ...]) -> tuple[Function, str, str]:
    """``cvt``: a function, the type of its operand and that of its result."""
    *how, to, source = modifiers
    flush = "ftz" in how
    how = [m for m in how if m not in ("ftz", "sat")]
    saturated = "sat" in modifiers
    mode = how[0] if how else ""
    if to not in DTYPES or source not in DTYPES or len(how) > 1:
        raise PtxError(f"an unknown conversion: cvt.{'.'.join(modifiers)}")
    target, floats = DTYPES[to], (to[0] == "f" or to == "bf16", source[0] == "f" or source == "bf16")
    if floats == (True, True):
        function = _between_floats(to, source, mode)
    elif floats == (False, True) and mode in _ROUND:
        function = _to_integer(target, _ROUND[mode], source)
    elif floats == (False, False) and not mode:
        function = _between_integers(target, DTYPES[source], saturated)
    elif floats == (True, False) and mode == "rn" and to != "bf16":
        function = lambda a: a.astype(target)  # noqa: E731
    else:
        raise PtxError(f"an unknown conversion: cvt.{'.'.join(modifiers)}")
    if flush:
        inner = function
        function = lambda a: inner(flushed(a) if a.dtype == np.float32 else a)  # noqa: E731
    if saturated and floats[0]:
        raise PtxError(f"an unknown conversion: cvt.{'.'.join(modifiers)}")
    return function, source, to


def _between_floats(to: str, source: str, mode: str) -> Function:
    if mode in _ROUND and to == source == "f32":
        return _ROUND[mode]  # type: ignore[no-any-return]
    if mode not in ("rn", ""):
        raise PtxError(f"an unknown conversion: cvt.{mode}.{to}.{source}")
    if to == "bf16" and source == "f32":
        return to_bfloat16
    if source == "bf16" and to == "f32":
        return from_bfloat16
    if "bf16" in (to, source):
        raise PtxError(f"an unknown conversion: cvt.{mode}.{to}.{source}")
    return lambda a: a.astype(DTYPES[to])


def _between_integers(target: np.dtype[Any], source: np.dtype[Any], saturated: bool) -> Function:
    if not saturated:
        return lambda a: a.astype(target)
    limits = np.iinfo(target)
    low, high = max(limits.min, np.iinfo(source).min), min(limits.max, np.iinfo(source).max)
    return lambda a: np.clip(a, low, high).astype(target)


def _to_integer(target: np.dtype[Any], rounding: Function, source: str) -> Function:
    """Out of range is the nearest integer there is; NaN is 0, or the largest float's bits' on some GPUs: an error."""
    limits = np.iinfo(target)

    def convert(a: Array) -> Array:
        value = rounding(from_bfloat16(a) if source == "bf16" else a).astype(np.float64)
        if np.isnan(value).any():
            raise PtxError("NaN converted to an integer")
        inside = np.clip(value, float(limits.min), float(limits.max))
        result = np.where(inside >= float(limits.max), 0, inside).astype(target)
        return np.where(inside >= float(limits.max), limits.max, result).astype(target)

    return convert
