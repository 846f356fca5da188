"""Instructions as closures over the threads that run them. An instruction that is not here is an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.support.ptx.arithmetic import DTYPES, comparison, conversion, from_bfloat16, function_of, to_bfloat16
from tests.support.ptx.lanes import Array, Get, Lanes, Run, getter, immediate, mask_of, setter
from tests.support.ptx.text import (
    Address,
    Entry,
    Immediate,
    Instruction,
    Operand,
    Pair,
    PtxError,
    Register,
    Symbol,
    Vector,
    size_of,
)

# Which caches and orders: nothing to do here, where memory is one.
_HINTS = {"cs", "ca", "cg", "cv", "lu", "wb", "wt", "nc", "volatile", "relaxed", "acquire", "release", "weak"}
_SCOPES = {"gpu", "sys", "cta", "cluster", "acq_rel"}
_NOTHING = ("membar", "fence", "griddepcontrol", "setmaxnreg", "prefetch", "nanosleep")
_PENDING_TYPES = ("b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64")


def decode(entry: Entry, instruction: Instruction, others: Mapping[str, Callable[[Entry, Instruction], Run]]) -> Run:
    """What runs an instruction that does not end its basic block.

    Args:
        entry: The kernel.
        instruction: Of it.
        others: By opcode, what decodes instructions that threads of a warp run together.

    Raises:
        PtxError: If it is unknown.
    """
    opcode = instruction.opcode
    if opcode in _NOTHING:
        return lambda lanes: None
    if opcode in ("ld", "ldu"):
        return _load(entry, instruction)
    if opcode == "st":
        return _store(entry, instruction)
    if opcode in ("atom", "red"):
        return _atomic(entry, instruction)
    if opcode in others:
        return others[opcode](entry, instruction)
    if instruction.predicate:
        return _merged(entry, instruction)
    return _computed(entry, instruction)


def results(instruction: Instruction) -> list[str]:
    """The registers that an instruction writes."""
    if instruction.opcode in ("st", "red", "bra", "bar", "ret", "exit", *_NOTHING) or not instruction.operands:
        return []
    if instruction.opcode in ("cp", "wgmma", "stmatrix", "barrier", "mbarrier"):
        first = instruction.operands[0]  # of wgmma: the product, to which it may add
        return names_in(first) if instruction.opcode == "wgmma" and isinstance(first, Vector) else []
    return names_in(instruction.operands[0])


def sources(instruction: Instruction) -> list[str]:
    """The registers that it reads."""
    written = results(instruction)
    operands = instruction.operands[1:] if written else instruction.operands
    found = [name for operand in operands for name in names_in(operand)]
    if instruction.opcode == "wgmma" and written:
        found += written
    return found + ([instruction.predicate] if instruction.predicate else [])


def names_in(operand: Operand | None) -> list[str]:
    """Of the registers in an operand; special ones are left out."""
    if isinstance(operand, Register):
        return [] if operand.name == "_" or "." in operand.name or operand.name == "%laneid" else [operand.name]
    if isinstance(operand, Address):
        return names_in(operand.base)
    if isinstance(operand, Vector):
        return [name for part in operand.parts for name in names_in(part)]
    if isinstance(operand, Pair):
        return names_in(operand.first) + names_in(operand.second)
    return []


def _merged(entry: Entry, instruction: Instruction) -> Run:
    """A predicated instruction that only computes: its results count where the predicate holds."""
    run, written, mask_for = _computed(entry, instruction), results(instruction), mask_of(instruction)

    def masked(lanes: Lanes) -> None:
        mask = mask_for(lanes)
        before = {name: lanes.values.get(name) for name in written}
        run(lanes)
        _keep(lanes, mask, before)

    return masked


def _keep(lanes: Lanes, mask: Array, before: dict[str, Array | None]) -> None:
    """Registers stay what they were in the threads whose predicate does not hold."""
    for name, old in before.items():
        if old is not None:
            new = lanes.values[name]
            lanes.values[name] = np.where(mask, new, old.view(new.dtype))


def _computed(entry: Entry, instruction: Instruction) -> Run:
    opcode, modifiers, operands = instruction.opcode, instruction.modifiers, instruction.operands
    if opcode in ("mov", "cvta"):
        return _move(entry, instruction)
    if opcode == "cvt":
        return _convert(entry, instruction)
    if opcode == "setp":
        return _compare(entry, instruction)
    if opcode == "selp":
        kind = modifiers[0]
        values = [getter(entry, operand, kind) for operand in operands[1:3]]
        condition, put = getter(entry, operands[3], "pred"), setter(entry, operands[0], kind)
        return lambda lanes: put(lanes, np.where(condition(lanes), values[0](lanes), values[1](lanes)))
    if opcode in ("and", "or", "xor", "not") and modifiers == ("pred",):
        function: Callable[..., Array] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(
            opcode, np.logical_not
        )
        kinds, result = ["pred"], "pred"
    else:
        function, kinds, result = function_of(opcode, modifiers)
    gets = [getter(entry, o, kinds[min(i, len(kinds) - 1)]) for i, o in enumerate(operands[1:])]
    return _applied(function, gets, setter(entry, operands[0], result))


def _applied(function: Callable[..., Array], gets: list[Get], put: Callable[[Lanes, Array], None]) -> Run:
    if len(gets) == 1:
        (only,) = gets
        return lambda lanes: put(lanes, function(only(lanes)))
    if len(gets) == 2:
        first, second = gets
        return lambda lanes: put(lanes, function(first(lanes), second(lanes)))
    return lambda lanes: put(lanes, function(*(get(lanes) for get in gets)))


def _move(entry: Entry, instruction: Instruction) -> Run:
    """Copies, packs or unpacks."""
    kind, (to, source) = instruction.modifiers[-1], instruction.operands
    if isinstance(source, Vector):  # packs: the first part is lowest
        size = size_of(kind)
        each = np.dtype(f"u{size // len(source.parts)}")
        gets = [getter(entry, part, f"u{8 * each.itemsize}") for part in source.parts]
        put = setter(entry, to, kind)
        named = [part.name if isinstance(part, Register) else "" for part in source.parts]

        def pack(lanes: Lanes) -> None:
            for name in named:  # LLVM packs what it does not need without giving it a value: anything will do
                if name and name not in lanes.values:
                    anything = lanes.launch.order.integers(0, 256, (lanes.count, each.itemsize), dtype=np.uint8)
                    lanes.values[name] = anything.view(each)[:, 0]
            packed = np.stack([np.broadcast_to(get(lanes), (lanes.count,)) for get in gets], axis=1)
            put(lanes, packed.view(f"u{size}")[:, 0].copy())

        return pack
    if isinstance(to, Vector):
        get = getter(entry, source, f"u{8 * size_of(kind)}")
        each = size_of(kind) // len(to.parts)
        puts = [setter(entry, part, f"u{8 * each}") for part in to.parts]

        def unpack(lanes: Lanes) -> None:
            parts = np.broadcast_to(get(lanes), (lanes.count,))[:, None].copy().view(f"u{each}")
            for i, put in enumerate(puts):
                put(lanes, parts[:, i].copy())

        return unpack
    get, put_one = getter(entry, source, kind), setter(entry, to, kind)
    return lambda lanes: put_one(lanes, get(lanes).copy())


def _convert(entry: Entry, instruction: Instruction) -> Run:
    *how, to, source = instruction.modifiers
    operands = instruction.operands
    if to in ("bf16x2", "f16x2") and source == "f32" and how == ["rn"]:
        high, low = (getter(entry, operand, "f32") for operand in operands[1:3])
        put = setter(entry, operands[0], "b32")

        def narrow(value: Array) -> Array:
            return to_bfloat16(value) if to == "bf16x2" else value.astype(np.float16).view(np.uint16)

        def pair(lanes: Lanes) -> None:
            upper = narrow(high(lanes)).astype(np.uint32) << np.uint32(16)
            put(lanes, upper | narrow(low(lanes)))

        return pair
    function, operand, result = conversion(instruction.modifiers)
    return _applied(function, [getter(entry, operands[1], operand)], setter(entry, operands[0], result))


def _compare(entry: Entry, instruction: Instruction) -> Run:
    name, *rest = instruction.modifiers
    kind = rest[-1]
    to = instruction.operands[0]
    if kind in ("bf16x2", "f16x2") and isinstance(to, Pair) and len(rest) == 1:
        return _compare_halves(entry, instruction, to)
    function = comparison(name, "f32" if kind == "bf16" else kind)
    if len(rest) > 1 and rest[0] in ("and", "or", "xor") and len(instruction.operands) == 4:
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[rest[0]]
        third = getter(entry, instruction.operands[3], "pred")
    elif len(rest) > 1 and rest[0] != "ftz":
        raise PtxError(f"an unknown comparison: {instruction.text}")
    else:
        combine = third = None
    a, b = (getter(entry, operand, kind) for operand in instruction.operands[1:3])
    if kind == "bf16":
        plain = function
        function = lambda x, y: plain(from_bfloat16(x), from_bfloat16(y))  # noqa: E731
    if isinstance(to, Pair):
        raise PtxError(f"an unknown comparison: {instruction.text}")
    put = setter(entry, to, "pred")
    if combine is not None and third is not None:
        return lambda lanes: put(lanes, combine(function(a(lanes), b(lanes)), third(lanes)))
    return lambda lanes: put(lanes, function(a(lanes), b(lanes)))


def _compare_halves(entry: Entry, instruction: Instruction, to: Pair) -> Run:
    """The two numbers of a register by themselves: a predicate for the lower and one for the upper."""
    name, kind = instruction.modifiers
    function = comparison(name, "f32")
    as_numbers = from_bfloat16 if kind == "bf16x2" else lambda bits: bits.view(np.float16)
    a, b = (getter(entry, operand, "u32") for operand in instruction.operands[1:])
    puts = [(setter(entry, part, "pred"), shift) for part, shift in ((to.first, 0), (to.second, 16))]

    def compare(lanes: Lanes) -> None:
        left, right = a(lanes), b(lanes)
        for put, shift in puts:
            halves = [(value >> np.uint32(shift)).astype(np.uint16) for value in (left, right)]
            put(lanes, function(*map(as_numbers, halves)))

    return compare


class Access:
    """A load, store or atomic operation: where it goes and what is moved."""

    def __init__(self, entry: Entry, instruction: Instruction, address: Operand) -> None:
        modifiers = instruction.modifiers
        spaces = [m for m in modifiers if m in ("global", "shared", "shared_cta", "param", "const", "local")]
        self.space = spaces[0].removesuffix("_cta") if spaces else "global"  # a generic address is a global one here
        self.kind = modifiers[-1]
        counts = [m for m in modifiers if m in ("v2", "v4", "v8")]
        self.count = int(counts[0][1:]) if counts else 1
        rest = set(modifiers[:-1]) - set(spaces) - set(counts) - _HINTS - _SCOPES
        self.extra = sorted(m for m in rest if not m.startswith(("L1_", "L2_")))
        if self.kind not in _PENDING_TYPES or self.space not in ("global", "shared", "param"):
            raise PtxError(f"an unknown instruction: {instruction.name}")
        self.strong = bool({"volatile", "relaxed", "acquire", "release"} & set(modifiers))
        self.size = size_of(self.kind)
        self.unsigned = f"u{8 * self.size}"
        self.mask = mask_of(instruction)
        self.address = address_getter(entry, address)

    def load(self, lanes: Lanes, at: Array, part: Any) -> list[Array]:
        """From the addresses `at` of the threads `part`."""
        if self.space == "global":
            return lanes.launch.memory.load(at, self.size, self.count, lanes.who(part, self.strong))
        if self.space == "param":
            return lanes.launch.parameters.load(at, self.size, self.count)
        return lanes.shared.load(lanes.blocks[part], lanes.warps[part], at, self.size, self.count)


def address_getter(entry: Entry, operand: Operand) -> Get:
    """Addresses, int64: of the process in global memory, offsets elsewhere."""
    if not isinstance(operand, Address):
        raise PtxError(f"not an address: {operand}")
    offset, base = np.int64(operand.offset), operand.base
    if isinstance(base, Register):
        wide = entry.registers.get(base.name) == 8
        get = getter(entry, base, "s64" if wide else "u32")
        return lambda lanes: get(lanes).astype(np.int64) + offset
    constant = immediate(base, "s64") if isinstance(base, Immediate) else getter(entry, base, "s64")(None)  # type: ignore[arg-type]
    assert isinstance(base, (Symbol, Immediate))
    return lambda lanes: np.full(lanes.count, constant[0] + offset)


def _load(entry: Entry, instruction: Instruction) -> Run:
    to, address = instruction.operands
    access = Access(entry, instruction, address)
    if access.extra:
        raise PtxError(f"an unknown instruction: {instruction.name}")
    targets = to.parts if isinstance(to, Vector) else (to,)
    if len(targets) != access.count:
        raise PtxError(f"{access.count} values into {len(targets)} registers: {instruction.text}")
    extended = access.kind if access.kind[0] == "s" else access.unsigned
    puts = [setter(entry, target, extended) for target in targets]
    names = names_in(to)
    dtype = DTYPES[extended]

    def load(lanes: Lanes) -> None:
        mask = access.mask(lanes)
        at = access.address(lanes)
        if mask is None or mask.all():
            for put, value in zip(puts, access.load(lanes, at, slice(None)), strict=True):
                put(lanes, value.view(dtype))
            return
        part = np.flatnonzero(mask)
        before = {name: lanes.values.get(name) for name in names}
        loaded = access.load(lanes, at[part], part) if part.size else [np.zeros(0, f"u{access.size}")] * access.count
        for put, value in zip(puts, loaded, strict=True):
            whole = np.zeros(lanes.count, dtype=dtype)
            whole[part] = value.view(dtype)
            put(lanes, whole)
        _keep(lanes, mask, before)

    return load


def _store(entry: Entry, instruction: Instruction) -> Run:
    address, source = instruction.operands
    access = Access(entry, instruction, address)
    if access.extra or access.space == "param":
        raise PtxError(f"an unknown instruction: {instruction.name}")
    operands = source.parts if isinstance(source, Vector) else (source,)
    if len(operands) != access.count:
        raise PtxError(f"{access.count} values from {len(operands)} registers: {instruction.text}")
    gets = [getter(entry, operand, access.unsigned if not isinstance(operand, Immediate) else access.kind)
            for operand in operands]  # fmt: skip

    def store(lanes: Lanes) -> None:
        mask = access.mask(lanes)
        part: Any = slice(None) if mask is None or mask.all() else np.flatnonzero(mask)
        at = access.address(lanes)[part]
        if not at.size:
            return
        values = [np.broadcast_to(get(lanes), (lanes.count,))[part] for get in gets]
        if access.space == "global":
            lanes.launch.memory.store(at, values, lanes.who(part, access.strong))
        else:
            lanes.shared.store(lanes.blocks[part], lanes.warps[part], at, values)

    return store


_ATOMIC: dict[str, Callable[..., Any]] = {
    "add": lambda old, b: old + b,
    "min": min,
    "max": max,
    "and": lambda old, b: old & b,
    "or": lambda old, b: old | b,
    "xor": lambda old, b: old ^ b,
    "exch": lambda old, b: b,
    "cas": lambda old, b, c: c if old == b else old,
}


def _atomic(entry: Entry, instruction: Instruction) -> Run:
    """One thread after the other, in any order."""
    returns = instruction.opcode == "atom"
    to = instruction.operands[0] if returns else Register("_")
    address, *operands = instruction.operands[1:] if returns else instruction.operands
    access = Access(entry, instruction, address)
    if len(access.extra) != 1 or access.extra[0] not in _ATOMIC or access.space != "global" or access.count != 1:
        raise PtxError(f"an unknown instruction: {instruction.name}")
    change, dtype = _ATOMIC[access.extra[0]], DTYPES[access.kind]
    gets = [getter(entry, operand, access.kind) for operand in operands]
    put = setter(entry, to, access.kind)
    name = to.name if isinstance(to, Register) else "_"

    def atomic(lanes: Lanes) -> None:
        mask = access.mask(lanes)
        part = np.arange(lanes.count) if mask is None else np.flatnonzero(mask)
        before = lanes.values.get(name)
        result = np.zeros(lanes.count, dtype=dtype) if before is None else before.copy().view(dtype)
        addresses = access.address(lanes)
        values = [np.broadcast_to(get(lanes), (lanes.count,)) for get in gets]
        for lane in lanes.launch.order.permutation(part):
            cell = lanes.launch.memory.cell(int(addresses[lane]), dtype, lanes.who(slice(lane, lane + 1)))
            result[lane] = cell[0]
            cell[0] = change(cell[0], *(value[lane] for value in values))
        put(lanes, result)

    return atomic
