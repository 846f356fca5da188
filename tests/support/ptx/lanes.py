"""The threads that run an instruction together, and how instructions reach their operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx.arithmetic import DTYPES
from tests.support.ptx.memory import Global, Parameters, Shared
from tests.support.ptx.order import Who
from tests.support.ptx.text import Entry, Immediate, Instruction, Operand, PtxError, Register, Symbol, size_of

Array = NDArray[Any]
WARP = 32


class Launch(NamedTuple):
    """What all blocks of a launch share."""

    entry: Entry
    grid: int
    parameters: Parameters
    memory: Global
    order: np.random.Generator  # of what a GPU leaves open


class Lanes:
    """Threads at one instruction.

    Attributes:
        values: By register; each array belongs to one register alone.
        numbers: Of the threads among those that are resident, ascending.
        blocks: The row of shared memory of each thread.
        threads: ``%tid.x``.
        warps: Of each thread within its block.
        warp_numbers: Of each thread's warp among all resident ones.
    """

    def __init__(self, launch: Launch, shared: Shared, copies: Copies, block_ids: Array, threads: int) -> None:
        self.launch, self.shared, self.copies = launch, shared, copies
        self.values: dict[str, Array] = {}
        self.assigned: dict[str, Array] = {}  # of registers that only some threads may have given a value
        self.count = block_ids.size * threads
        self.numbers = np.arange(self.count)
        self.blocks, self.threads = self.numbers // threads, self.numbers % threads
        self.warps = self.threads // WARP
        self.warp_numbers = self.blocks * (-(-threads // WARP)) + self.warps
        self.block_ids = block_ids[self.blocks]
        self.block_threads = threads
        self.epochs = np.zeros(block_ids.size, dtype=np.int64)  # barriers that each block has passed

    def part(self, numbers: Array, values: dict[str, Array]) -> Lanes:
        """Some of the threads, with registers of their own."""
        lanes = object.__new__(Lanes)
        lanes.launch, lanes.shared, lanes.copies, lanes.assigned = self.launch, self.shared, self.copies, self.assigned
        lanes.epochs = self.epochs
        lanes.values, lanes.numbers, lanes.count, lanes.block_threads = (
            values,
            numbers,
            numbers.size,
            self.block_threads,
        )
        for name in ("blocks", "threads", "warps", "warp_numbers", "block_ids"):
            setattr(lanes, name, getattr(self, name)[numbers])
        return lanes

    def who(self, part: Any, strong: bool = False) -> Who:
        """The threads at these places, for memory that all blocks share."""
        return Who(self.block_ids[part], self.warps[part], self.epochs[self.blocks[part]], strong)

    def places(self, numbers: Array) -> Array:
        """Where threads are among these.

        Raises:
            PtxError: If one is not here: it has left, or takes another branch.
        """
        at = np.minimum(np.searchsorted(self.numbers, numbers), self.count - 1)
        if (self.numbers[at] != numbers).any():
            raise PtxError("a thread of the warp is missing")
        return at


class Copies:
    """Asynchronous copies to shared memory (``cp.async``) that nobody has waited for."""

    def __init__(self, count: int) -> None:
        self._committed = np.zeros(count, dtype=np.int64)  # groups of each thread
        self._pending: list[tuple[Array, Array, Array, Array, int]] = []

    def start(self, numbers: Array, at: Array, warps: Array, size: int) -> None:
        self._pending.append((numbers, self._committed[numbers], at, warps, size))

    def commit(self, lanes: Lanes) -> None:
        self._committed[lanes.numbers] += 1

    def wait(self, lanes: Lanes, groups: int | None) -> None:
        """Until at most that many groups of each of these threads are under way; None: also what is in no group."""
        waiting = np.zeros(self._committed.size, dtype=bool)
        waiting[lanes.numbers] = True
        kept = []
        for numbers, group, at, warps, size in self._pending:
            done = waiting[numbers] & (True if groups is None else group < self._committed[numbers] - groups)
            if done.any():
                lanes.shared.write(at[done], warps[done], None, size)
            if not done.all():
                kept.append((numbers[~done], group[~done], at[~done], warps[~done], size))
        self._pending = kept


Run = Callable[[Lanes], None]
Get = Callable[[Lanes], Array]


def view(value: Array, dtype: np.dtype[Any]) -> Array:
    return value if value.dtype == dtype else value.view(dtype)


_SPECIAL: dict[str, Callable[[Lanes], Any]] = {
    "%tid.x": lambda lanes: lanes.threads,
    "%ctaid.x": lambda lanes: lanes.block_ids,
    "%laneid": lambda lanes: lanes.threads % WARP,
    "%ntid.x": lambda lanes: lanes.block_threads,
    "%nctaid.x": lambda lanes: lanes.launch.grid,
    **dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"), lambda lanes: 0),
    **dict.fromkeys(("%ntid.y", "%ntid.z", "%nctaid.y", "%nctaid.z"), lambda lanes: 1),
}


def immediate(operand: Immediate, kind: str) -> Array:
    """As an array of one element."""
    dtype = DTYPES[kind]
    if operand.size and operand.size == dtype.itemsize:
        return np.array([operand.bits], dtype=f"u{operand.size}").view(dtype)
    if operand.size:  # a double in decimal notation, for a float
        return np.array([operand.bits], dtype="u8").view("f8").astype(dtype)
    if dtype.kind == "f":
        return np.array([operand.bits], dtype=dtype)
    mask = (1 << 8 * dtype.itemsize) - 1
    return np.array([operand.bits & mask], dtype=f"u{dtype.itemsize}").view(dtype)


def getter(entry: Entry, operand: Operand, kind: str) -> Get:
    """What reads an operand as a type. The result may be the register's own array, or have one element."""
    dtype = DTYPES[kind]
    if isinstance(operand, Immediate):
        constant = immediate(operand, kind) if kind != "pred" else np.array([bool(operand.bits)])
        return lambda lanes: constant
    if isinstance(operand, Symbol):
        variable = entry.shared.get(operand.name) or entry.parameters.get(operand.name)
        if variable is None:
            raise PtxError(f"an unknown name: {operand.name}")
        address = np.array([variable.offset], dtype=dtype)
        return lambda lanes: address
    if not isinstance(operand, Register):
        raise PtxError(f"an operand that is no value: {operand}")
    name = operand.name
    if name in _SPECIAL:
        special = _SPECIAL[name]
        return lambda lanes: np.broadcast_to(np.asarray(special(lanes), dtype=dtype), (lanes.count,))
    if name not in entry.registers:
        raise PtxError(f"an unknown register: {name}")
    size = entry.registers[name]
    if kind == "pred" or size == dtype.itemsize:
        return lambda lanes: view(lanes.values[name], dtype)
    if size > dtype.itemsize:  # the low bits
        unsigned = np.dtype(f"u{size}")
        return lambda lanes: view(lanes.values[name], unsigned).astype(f"u{dtype.itemsize}").view(dtype)
    raise PtxError(f"register {name} has {size} bytes, {kind} has more")


def setter(entry: Entry, operand: Operand, kind: str) -> Callable[[Lanes, Array], None]:
    """What writes a result, an array of its own or of one element."""
    if not isinstance(operand, Register):
        raise PtxError(f"a result that is no register: {operand}")
    name = operand.name
    if name == "_":
        return lambda lanes, value: None
    size = entry.registers[name]
    extended = None
    if kind != "pred" and size > size_of(kind):
        extended = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{size}")
    elif kind != "pred" and size < size_of(kind):
        raise PtxError(f"register {name} has {size} bytes, {kind} has more")

    def put(lanes: Lanes, value: Array) -> None:
        if extended is not None:
            value = value.astype(extended)
        if value.size != lanes.count:
            value = np.broadcast_to(value, (lanes.count,)).copy()
        lanes.values[name] = value

    return put


def mask_of(instruction: Instruction) -> Callable[[Lanes], Array | None]:
    """Which of the threads take part; None: all."""
    name, negated = instruction.predicate, instruction.negated
    if not name:
        return lambda lanes: None
    return lambda lanes: ~lanes.values[name] if negated else lanes.values[name]
