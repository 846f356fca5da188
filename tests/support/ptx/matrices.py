"""Matrices in shared memory and tensor cores: ``ldmatrix``, ``stmatrix``, ``mma``, ``wgmma``, ``cp.async``.

Products are sums in float64, rounded to float32 once; a GPU's tensor cores round more often, in an order that nobody
has written down. Asynchronous copies are seen once their threads have waited for them. Asynchronous products read
shared memory when they are issued; whether somebody waits, and fences between proxies, is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.support.ptx.arithmetic import from_bfloat16
from tests.support.ptx.decode import address_getter
from tests.support.ptx.lanes import WARP, Array, Get, Lanes, Run, getter, mask_of, setter
from tests.support.ptx.text import Entry, Immediate, Instruction, Operand, PtxError, Vector
from tests.support.ptx.warps import by_warp

_GROUP = 4 * WARP  # threads of a warpgroup


def _rows(lanes: Lanes, addresses: Array, matrix: int) -> Array:
    """For each thread the address of the row of an 8x8 matrix that its values are in."""
    lane = lanes.threads % WARP
    if (addresses % 16).any():
        raise PtxError("a row of a matrix that is not aligned")
    return addresses[np.arange(lanes.count) - lane + 8 * matrix + lane // 4]  # type: ignore[no-any-return]


def _count(instruction: Instruction) -> int:
    match = re.fullmatch(r"(?:ld|st)matrix\.sync\.aligned\.m8n8\.x([124])\.shared(?:_cta)?\.b16", instruction.name)
    if match is None:
        raise PtxError(f"an unknown instruction: {instruction.name}")
    return int(match[1])


def _load_matrix(entry: Entry, instruction: Instruction) -> Run:
    count, address = _count(instruction), address_getter(entry, instruction.operands[1])
    to = instruction.operands[0]
    puts = [setter(entry, part, "b32") for part in (to.parts if isinstance(to, Vector) else (to,))]

    def load(lanes: Lanes) -> None:
        by_warp(lanes, instruction)
        addresses = address(lanes)
        for matrix in range(count):
            at = _rows(lanes, addresses, matrix) + 4 * (lanes.threads % 4)
            puts[matrix](lanes, lanes.shared.load(lanes.blocks, lanes.warps, at, 4, 1)[0])

    return load


def _store_matrix(entry: Entry, instruction: Instruction) -> Run:
    count, address = _count(instruction), address_getter(entry, instruction.operands[0])
    source = instruction.operands[1]
    gets = [getter(entry, part, "b32") for part in (source.parts if isinstance(source, Vector) else (source,))]

    def store(lanes: Lanes) -> None:
        by_warp(lanes, instruction)
        addresses = address(lanes)
        for matrix in range(count):
            at = _rows(lanes, addresses, matrix) + 4 * (lanes.threads % 4)
            lanes.shared.store(lanes.blocks, lanes.warps, at, [gets[matrix](lanes)])

    return store


def _halves(value: Array, kind: str) -> tuple[Array, Array]:
    """The two 16-bit floats of a register, as float64."""
    low, high = value.astype(np.uint16), (value >> np.uint32(16)).astype(np.uint16)
    if kind == "bf16":
        return from_bfloat16(low).astype(np.float64), from_bfloat16(high).astype(np.float64)
    return low.view(np.float16).astype(np.float64), high.view(np.float16).astype(np.float64)


def _parts(operand: Operand) -> tuple[Operand, ...]:
    if not isinstance(operand, Vector):
        raise PtxError(f"not a vector: {operand}")
    return operand.parts


def _multiply(entry: Entry, instruction: Instruction) -> Run:
    """``mma.m16n8k16`` of one warp: of the fragments in NVIDIA's manual, g = lane / 4 and t = lane % 4."""
    match = re.fullmatch(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.\1\.f32", instruction.name)
    if match is None:
        raise PtxError(f"an unknown instruction: {instruction.name}")
    kind = match[1]
    to, a, b, c = (_parts(operand) for operand in instruction.operands)
    puts = [setter(entry, part, "f32") for part in to]
    gets_a, gets_b = ([getter(entry, part, "b32") for part in parts] for parts in (a, b))
    gets_c = [getter(entry, part, "f32") for part in c]
    g, t = np.arange(WARP) // 4, 2 * (np.arange(WARP) % 4)

    def multiply(lanes: Lanes) -> None:
        warps = by_warp(lanes, instruction)
        left, right, total = (np.empty((warps, *shape)) for shape in ((16, 16), (16, 8), (16, 8)))
        for i, get in enumerate(gets_a):
            for j, value in enumerate(_halves(get(lanes), kind)):
                left[:, g + 8 * (i % 2), t + 8 * (i // 2) + j] = value.reshape(warps, WARP)
        for i, get in enumerate(gets_b):
            for j, value in enumerate(_halves(get(lanes), kind)):
                right[:, t + 8 * i + j, g] = value.reshape(warps, WARP)
        for i, get in enumerate(gets_c):
            total[:, g + 8 * (i // 2), t + i % 2] = get(lanes).reshape(warps, WARP)
        total += left @ right
        for i, put in enumerate(puts):
            put(lanes, total[:, g + 8 * (i // 2), t + i % 2].astype(np.float32).reshape(-1))

    return multiply


def _described(lanes: Lanes, descriptor: Array, rows: int, kind: str) -> Array:
    """A matrix ``[rows, 16]`` of each warpgroup in shared memory, along its rows, as a descriptor says."""
    groups = lanes.count // _GROUP
    words = descriptor.reshape(groups, _GROUP).astype(np.uint64)
    if (words != words[:, :1]).any():
        raise PtxError("threads of a warpgroup have different descriptors")
    word = words[:, 0].astype(object)
    start, leading, stride = ([(int(w) >> at & 0x3FFF) << 4 for w in word] for at in (0, 16, 32))
    mode = {int(w) >> 62 for w in word}
    if len(mode) != 1 or any(int(w) >> 49 & 7 for w in word):
        raise PtxError(f"an unknown descriptor: {int(word[0]):#x}")
    r, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    base, by_rows, by_columns = (np.array(v)[:, None, None] for v in (start, stride, leading))
    swizzle = {0: 0, 1: 3, 2: 2, 3: 1}[mode.pop()]  # bits
    if swizzle == 0:
        at = base + r // 8 * by_rows + k // 8 * by_columns + r % 8 * 16 + k % 8 * 2
    else:
        at = base + r // 8 * by_rows + r % 8 * (16 << swizzle) + 2 * k
        at ^= ((at >> 7) & ((1 << swizzle) - 1)) << 4
    first = np.arange(groups) * _GROUP
    flat = at.reshape(-1)
    blocks = np.repeat(lanes.blocks[first], rows * 16)
    for warp in (0, 1):  # read by several
        bits = lanes.shared.load(blocks, np.repeat(lanes.warps[first], rows * 16) + warp, flat, 2, 1)[0]
    values = from_bfloat16(bits) if kind == "bf16" else bits.view(np.float16)
    return values.astype(np.float64).reshape(groups, rows, 16)


def _descriptor(entry: Entry, operand: Operand, rows: int, kind: str) -> Get:
    get = getter(entry, operand, "b64")
    return lambda lanes: _described(lanes, get(lanes), rows, kind)


def _fragment(entry: Entry, operand: Vector, kind: str) -> Get:
    """A matrix ``[64, 16]`` of each warpgroup in its registers: 16 rows in each warp, as for ``mma``."""
    gets = [getter(entry, part, "b32") for part in operand.parts]
    thread = np.arange(_GROUP)
    g, t = 16 * (thread // WARP) + thread % WARP // 4, 2 * (thread % 4)

    def fragment(lanes: Lanes) -> Array:
        groups = lanes.count // _GROUP
        matrix = np.empty((groups, 64, 16))
        for i, get in enumerate(gets):
            for j, value in enumerate(_halves(get(lanes), kind)):
                matrix[:, g + 8 * (i % 2), t + 8 * (i // 2) + j] = value.reshape(groups, _GROUP)
        return matrix

    return fragment


def _multiply_in_group(entry: Entry, instruction: Instruction) -> Run:
    """``wgmma.mma_async``: both operands in shared memory, the product in the registers of four warps."""
    match = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2", instruction.name)
    if match is None:
        if instruction.modifiers[0] in ("fence", "commit_group", "wait_group"):
            return lambda lanes: None
        raise PtxError(f"an unknown instruction: {instruction.name}")
    columns, kind = int(match[1]), match[2]
    to, a, b, adds, *constants = instruction.operands
    wanted = [1, 1, 0] if isinstance(a, Vector) else [1, 1, 0, 0]  # signs, and that nothing is transposed
    if [c.bits if isinstance(c, Immediate) else None for c in constants] != wanted:
        raise PtxError(f"an unknown instruction: {instruction.text}")
    gets = [getter(entry, part, "f32") for part in _parts(to)]
    puts = [setter(entry, part, "f32") for part in _parts(to)]
    left = _fragment(entry, a, kind) if isinstance(a, Vector) else _descriptor(entry, a, 64, kind)
    right, added = _descriptor(entry, b, columns, kind), getter(entry, adds, "pred")
    thread = np.arange(_GROUP)
    g, t = 16 * (thread // WARP) + thread % WARP // 4, 2 * (thread % 4)

    def multiply(lanes: Lanes) -> None:
        if by_warp(lanes, instruction) % 4 or (lanes.threads[::_GROUP] % _GROUP).any():
            raise PtxError("a warp of the warpgroup is missing")
        groups = lanes.count // _GROUP
        total = left(lanes) @ right(lanes).swapaxes(1, 2)
        kept = np.broadcast_to(added(lanes), (lanes.count,))
        for i, (get, put) in enumerate(zip(gets, puts, strict=True)):
            part = total[:, g + 8 * (i // 2 % 2), 8 * (i // 4) + t + i % 2].reshape(-1)
            old = get(lanes).astype(np.float64) if i or kept.any() else np.zeros(groups * _GROUP)
            put(lanes, np.where(kept, old + part, part).astype(np.float32))

    return multiply


def _copy(entry: Entry, instruction: Instruction) -> Run:
    """``cp.async``: what nobody waited for has no content yet."""
    name = instruction.name
    if name == "cp.async.commit_group":
        return lambda lanes: lanes.copies.commit(lanes)
    if name in ("cp.async.wait_group", "cp.async.wait_all"):
        groups = instruction.operands[0] if instruction.operands else None
        number = groups.bits if isinstance(groups, Immediate) else None
        return lambda lanes: lanes.copies.wait(lanes, number)
    if not re.fullmatch(r"cp\.async\.c[ag]\.shared(_cta)?\.global(\.L2_128B)?", name):
        raise PtxError(f"an unknown instruction: {name}")
    to, source = (address_getter(entry, operand) for operand in instruction.operands[:2])
    size = instruction.operands[2]
    if not isinstance(size, Immediate):
        raise PtxError(f"an unknown instruction: {instruction.text}")
    taken = getter(entry, instruction.operands[3] if len(instruction.operands) > 3 else size, "u32")
    mask_for = mask_of(instruction)

    def copy(lanes: Lanes) -> None:
        mask = mask_for(lanes)
        part: Any = np.arange(lanes.count) if mask is None else np.flatnonzero(mask)
        if not part.size:
            return
        read = np.broadcast_to(taken(lanes), (lanes.count,))[part]
        if not np.isin(read, (0, size.bits)).all():
            raise PtxError(f"a copy of a part of {size.bits} bytes")
        words = [np.zeros(part.size, dtype=np.uint32) for _ in range(size.bits // 4)]
        full = np.flatnonzero(read)
        if full.size:
            who = lanes.who(part[full])
            loaded = lanes.launch.memory.load(source(lanes)[part[full]], 4, size.bits // 4, who)
            for word, value in zip(words, loaded, strict=True):
                word[full] = value
        at = lanes.shared.store(lanes.blocks[part], lanes.warps[part], to(lanes)[part], words)
        lanes.shared.forget(at, size.bits)
        lanes.copies.start(lanes.numbers[part], at, lanes.warps[part], size.bits)

    return copy


DECODERS: dict[str, Callable[[Entry, Instruction], Run]] = {
    "ldmatrix": _load_matrix,
    "stmatrix": _store_matrix,
    "mma": _multiply,
    "wgmma": _multiply_in_group,
    "cp": _copy,
}
