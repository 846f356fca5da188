"""Instructions that the threads of a warp run together: exchanges, votes, reductions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.support.ptx.arithmetic import DTYPES
from tests.support.ptx.lanes import WARP, Array, Lanes, Run, getter, setter
from tests.support.ptx.text import Entry, Instruction, Pair, PtxError

_ALL = 0xFFFFFFFF


def by_warp(lanes: Lanes, instruction: Instruction) -> int:
    """The number of warps; these threads are whole warps, in order.

    Raises:
        PtxError: If threads of a warp are missing, though the instruction waits for all of them.
    """
    if lanes.count % WARP or (lanes.numbers.reshape(-1, WARP)[:, 0] % WARP != 0).any():
        raise PtxError("a thread of the warp is missing")
    if (lanes.numbers.reshape(-1, WARP)[:, -1] - lanes.numbers.reshape(-1, WARP)[:, 0] != WARP - 1).any():
        raise PtxError("a thread of the warp is missing")
    if instruction.predicate:
        raise PtxError("a warp's instruction with a predicate")
    return lanes.count // WARP


def _whole(instruction: Instruction, mask: Array) -> None:
    if (mask != _ALL).any():
        raise PtxError(f"a warp's instruction for some of its threads: {instruction.text}")


def _shuffle(entry: Entry, instruction: Instruction) -> Run:
    if instruction.modifiers[0] != "sync" or instruction.modifiers[2] != "b32" or len(instruction.operands) != 5:
        raise PtxError(f"an unknown instruction: {instruction.name}")
    mode = instruction.modifiers[1]
    to = instruction.operands[0]
    put = setter(entry, to.first if isinstance(to, Pair) else to, "b32")
    put_inside = setter(entry, to.second, "pred") if isinstance(to, Pair) else None
    a, b, c, members = (getter(entry, operand, "u32") for operand in instruction.operands[1:])

    def shuffle(lanes: Lanes) -> None:
        by_warp(lanes, instruction)
        _whole(instruction, members(lanes))
        lane = lanes.threads % WARP
        by, clamp = b(lanes).astype(np.int64) & 31, c(lanes).astype(np.int64)
        segment = (clamp >> 8) & 31
        limit = (lane & segment) | (clamp & 31 & ~segment)
        if mode == "bfly":
            source = lane ^ by
            inside = source <= limit
        elif mode == "up":
            source = lane - by
            inside = source >= limit
        elif mode == "down":
            source = lane + by
            inside = source <= limit
        else:
            source = (lane & segment) | (by & ~segment)
            inside = source <= limit
        source = np.where(inside, source, lane)
        put(lanes, a(lanes)[np.arange(lanes.count) - lane + source])
        if put_inside is not None:
            put_inside(lanes, inside)

    return shuffle


_REDUCTIONS: dict[str, np.ufunc] = {
    "or": np.bitwise_or,
    "and": np.bitwise_and,
    "xor": np.bitwise_xor,
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
}


def _reduce(entry: Entry, instruction: Instruction) -> Run:
    if instruction.modifiers[0] != "sync" or instruction.modifiers[1] not in _REDUCTIONS:
        raise PtxError(f"an unknown instruction: {instruction.name}")
    function, kind = _REDUCTIONS[instruction.modifiers[1]], instruction.modifiers[2]
    put = setter(entry, instruction.operands[0], kind)
    value, members = getter(entry, instruction.operands[1], kind), getter(entry, instruction.operands[2], "u32")

    def reduce(lanes: Lanes) -> None:
        warps = by_warp(lanes, instruction)
        _whole(instruction, members(lanes))
        values = np.broadcast_to(value(lanes), (lanes.count,)).reshape(warps, WARP)
        put(lanes, np.repeat(function.reduce(values, axis=1, dtype=DTYPES[kind]), WARP))

    return reduce


def _vote(entry: Entry, instruction: Instruction) -> Run:
    if instruction.modifiers[0] != "sync" or instruction.modifiers[1] not in ("any", "all", "ballot"):
        raise PtxError(f"an unknown instruction: {instruction.name}")
    how = instruction.modifiers[1]
    put = setter(entry, instruction.operands[0], "b32" if how == "ballot" else "pred")
    value, members = getter(entry, instruction.operands[1], "pred"), getter(entry, instruction.operands[2], "u32")

    def vote(lanes: Lanes) -> None:
        warps = by_warp(lanes, instruction)
        _whole(instruction, members(lanes))
        votes = np.broadcast_to(value(lanes), (lanes.count,)).reshape(warps, WARP)
        if how == "ballot":
            result = (votes << np.arange(WARP, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
        else:
            result = votes.any(axis=1) if how == "any" else votes.all(axis=1)
        put(lanes, np.repeat(result, WARP))

    return vote


DECODERS: dict[str, Callable[[Entry, Instruction], Run]] = {"shfl": _shuffle, "redux": _reduce, "vote": _vote}
