"""Runs a kernel's PTX: all threads of many blocks at once, one array per register.

Every thread has a program counter. The threads at the lowest one run a basic block together, as a whole where all are
there, else on copies of the registers that the block reads; so branches that part come together again where the code
does. With a seed it is one warp's turn, and that of some others that are at the same place, and few blocks are resident
at a time: what a GPU leaves open is then different with every seed.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tests.support.ptx import matrices, warps
from tests.support.ptx.decode import decode, names_in, results, sources
from tests.support.ptx.definedness import followed, watched
from tests.support.ptx.lanes import WARP, Array, Copies, Lanes, Launch, Run, mask_of
from tests.support.ptx.memory import Global, Parameters, Shared
from tests.support.ptx.text import ENDS, Entry, Immediate, Instruction, PtxError, Symbol, parse

_RESIDENT = 64  # blocks at a time
_FEW = 6  # where the order is random
_LATE = 0.2  # of the warps
_CHANGE = 0.01  # how often they are others
_WAITING = 2**20  # added to the program counter of a thread at a barrier
_GONE = 2**24

_OTHERS = warps.DECODERS | matrices.DECODERS

executed: Counter[str] = Counter()
"""Launches, blocks, threads and instructions of threads so far, for reports."""


class _Step(NamedTuple):
    run: Run
    text: str


class _Block:
    """A basic block.

    Attributes:
        inputs: Registers that it reads before it writes them.
        outputs: Registers that it writes, and others or its next turn read.
        unsure_end: Registers without a value, perhaps, by which it decides where to go on.
    """

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self.instructions = instructions
        self.end = instructions[-1] if instructions[-1].opcode in ENDS else None
        self.body = instructions[:-1] if self.end else instructions
        self.inputs: set[str] = set()
        self.weak: set[str] = set()  # kept where a predicate does not hold
        self.written: set[str] = set()
        self.surely: set[str] = set()
        for instruction in instructions:
            self.inputs |= set(sources(instruction)) - self.surely
            if instruction.predicate:
                self.weak |= set(results(instruction)) - self.surely
            else:
                self.surely |= set(results(instruction))
            self.written |= set(results(instruction))
        self.outputs: set[str] = set()
        self.steps: list[_Step] = []
        self.unsure_end: list[str] = []


class Program:
    """A kernel that is ready to run.

    Args:
        entry: The kernel.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.blocks = [_Block(block) for block in entry.blocks]
        read = Counter(name for block in self.blocks for name in block.inputs | block.weak)
        for block in self.blocks:
            block.outputs = {name for name in block.written if read[name]}
        in_groups = any(i.opcode == "wgmma" for block in self.blocks for i in block.instructions)
        self.together = 4 if in_groups else 1  # warps that take their turns together
        self.next = [self._following(number) for number in range(len(self.blocks))]
        unsure = self._unsure()
        self._tracked = {name for block in unsure for names in block for name in names}
        for block, of_block in zip(self.blocks, unsure, strict=True):
            block.steps = [self._step(*each) for each in zip(block.body, of_block, strict=False)]
            block.unsure_end = of_block[-1] if block.end else []

    def _step(self, instruction: Instruction, unsure: list[str]) -> _Step:
        try:
            run = decode(self.entry, instruction, _OTHERS)
        except PtxError as error:
            raise PtxError(f"{self.entry.name}: {error} in: {instruction.text}") from None
        written = [name for name in results(instruction) if name in self._tracked]
        if unsure or written:
            run = watched(run, instruction, unsure, written)
        return _Step(run, instruction.text)

    def _following(self, number: int) -> list[int]:
        """The blocks that may come after a block."""
        end = self.blocks[number].end
        following = [number + 1] if number + 1 < len(self.blocks) else []
        if end is None or end.opcode in ("bar", "barrier"):
            return following
        if end.opcode == "bra":
            return [self._target(end), *(following if end.predicate else [])]
        return following if end.predicate else []

    def _target(self, branch: Instruction) -> int:
        target = branch.operands[0]
        if not isinstance(target, Symbol) or target.name not in self.entry.targets:
            raise PtxError(f"{self.entry.name}: a branch to nowhere: {branch.text}")
        return self.entry.targets[target.name]

    def _unsure(self) -> list[list[list[str]]]:
        """For each instruction of each block what it reads though not every way to it has given it a value."""
        missing: list[set[str]] = [set() for _ in self.blocks]
        missing[0] = set(self.entry.registers)
        found: list[list[list[str]]] = [[] for _ in self.blocks]
        work = list(reversed(range(len(self.blocks))))
        while work:
            number = work.pop()
            after = set(missing[number])
            found[number] = [followed(instruction, after) for instruction in self.blocks[number].instructions]
            for to in self.next[number]:
                if not after <= missing[to]:
                    missing[to] |= after
                    work.append(to)
        return found

    def run(
        self,
        grid: int,
        arguments: bytes,
        memory: Global,
        *,
        shared: int = 0,
        threads: int = 0,
        seed: int | None = None,
    ) -> None:
        """Run all blocks.

        Args:
            grid: The number of blocks.
            arguments: The content of parameter space.
            memory: What the launch may touch.
            shared: Bytes of shared memory that the launch adds.
            threads: Of a block, if the kernel does not say.
            seed: Of a random order; without one all resident blocks go in step.
        """
        order = np.random.default_rng(seed)
        memory.watch(grid)
        launch = Launch(self.entry, grid, Parameters(arguments), memory, order)
        numbers = np.arange(grid) if seed is None else order.permutation(grid)
        size = shared + max((v.offset + v.size for v in self.entry.shared.values()), default=0)
        executed.update(launches=1, blocks=grid, threads=grid * (self.entry.threads or threads))
        begin = 0
        while begin < grid:
            count = _RESIDENT if seed is None else int(order.integers(1, _FEW + 1))
            wave = _Wave(self, launch, numbers[begin : begin + count], size, self.entry.threads or threads)
            with np.errstate(all="ignore"):
                wave.run(seed is not None)
            begin += count


class _Wave:
    """The blocks that are resident together."""

    def __init__(self, program: Program, launch: Launch, block_ids: Array, shared: int, threads: int) -> None:
        self._program, self._launch = program, launch
        count = block_ids.size * threads
        self._lanes = Lanes(launch, Shared(block_ids.size, shared), Copies(count), block_ids, threads)
        self._lanes.assigned = {name: np.zeros(count, dtype=bool) for name in program._tracked}
        self._at = np.zeros(count, dtype=np.int64)  # program counters
        self._alive = np.full(block_ids.size, threads)
        self._arrived = np.zeros(block_ids.size, dtype=np.int64)
        self._units = self._lanes.warp_numbers // program.together
        self._late = launch.order.random(int(self._units[-1]) + 1) < _LATE

    def run(self, shuffled: bool) -> None:
        while (now := int(self._at.min())) < _WAITING:
            here = self._at == (self._chosen() if shuffled else now)
            if shuffled:
                now = self._turn
                here = (self._at == now) & self._who[self._units]
            self._turn_of(now, None if here.all() else np.flatnonzero(here))
        if now < _GONE:
            raise PtxError(f"{self._program.entry.name}: threads wait at a barrier that others do not reach")

    def _chosen(self) -> int:
        """A warp whose turn it is, and some of those that are at the same place."""
        warps = self._units
        lowest = np.full(int(warps[-1]) + 1, _GONE)
        np.minimum.at(lowest, warps, self._at)
        if self._launch.order.random() < _CHANGE:
            self._late = self._launch.order.random(lowest.size) < _LATE
        runnable = np.flatnonzero((lowest < _WAITING) & ~self._late)
        if not runnable.size:
            runnable = np.flatnonzero(lowest < _WAITING)
        chosen = int(self._launch.order.choice(runnable))
        self._turn = int(lowest[chosen])
        self._who = (lowest == self._turn) & (self._launch.order.random(lowest.size) < 0.5) & ~self._late
        self._who[chosen] = True
        return self._turn

    def _turn_of(self, number: int, part: Array | None) -> None:
        """Threads run a basic block; None: all."""
        block, all_lanes = self._program.blocks[number], self._lanes
        if part is None:
            lanes = all_lanes
        else:
            values = all_lanes.values
            lanes = all_lanes.part(part, {n: values[n][part] for n in block.inputs | block.weak if n in values})
        executed["instructions"] += lanes.count * len(block.instructions)
        step = _Step(lambda lanes: None, "")
        try:
            for step in block.steps:
                step.run(lanes)
        except PtxError as error:
            raise PtxError(f"{self._program.entry.name}: {error}; in: {step.text}") from None
        if part is not None:
            for name in block.outputs & lanes.values.keys():
                self._put_back(name, lanes.values[name], part)
        self._move_on(number, block, lanes)

    def _put_back(self, name: str, value: Array, part: Array) -> None:
        values = self._lanes.values
        if name not in values:
            values[name] = np.zeros(self._lanes.count, dtype=value.dtype)
        values[name].view(value.dtype)[part] = value

    def _move_on(self, number: int, block: _Block, lanes: Lanes) -> None:
        end, at = block.end, lanes.numbers
        if end is None:
            self._at[at] = number + 1
            return
        if not all(lanes.assigned[name][at].all() for name in block.unsure_end):
            raise PtxError(f"{self._program.entry.name}: a branch by what has no value: {end.text}")
        mask = mask_of(end)(lanes)
        if end.predicate:
            for name in names_in(end.operands[0]) if end.operands else []:
                raise PtxError(f"a branch through a register {name}")
        if end.opcode == "bra":
            target = self._program._target(end)
            self._at[at] = target if mask is None else np.where(mask, target, number + 1)
        elif end.opcode in ("ret", "exit"):
            gone = at if mask is None else at[mask]
            self._at[at] = number + 1
            self._at[gone] = _GONE
            self._alive -= np.bincount(lanes.blocks if mask is None else lanes.blocks[mask], minlength=self._alive.size)
            self._release(np.flatnonzero(self._arrived))
        else:
            self._wait(end, number, lanes)

    def _wait(self, barrier: Instruction, number: int, lanes: Lanes) -> None:
        if barrier.opcode == "bar" and barrier.modifiers[:1] == ("warp",):
            self._at[lanes.numbers] = number + 1
            return
        self._check_barrier(barrier)
        self._at[lanes.numbers] = number + 1 + _WAITING
        self._arrived += np.bincount(lanes.blocks, minlength=self._arrived.size)
        self._release(np.unique(lanes.blocks))

    def _check_barrier(self, barrier: Instruction) -> None:
        first, *count = barrier.operands
        whole = all(isinstance(o, Immediate) and o.bits == self._lanes.block_threads for o in count)
        plain = set(barrier.modifiers) <= {"sync", "aligned", "cta"} and not barrier.predicate
        if not (plain and whole and isinstance(first, Immediate) and first.bits == 0):
            raise PtxError(f"{self._program.entry.name}: an unknown barrier: {barrier.text}")

    def _release(self, blocks: Array) -> None:
        """Those of the blocks whose threads are all at the barrier go on."""
        complete = blocks[(self._arrived[blocks] == self._alive[blocks]) & (self._arrived[blocks] > 0)]
        if complete.size:
            self._lanes.shared.barrier(complete)
            self._lanes.epochs[complete] += 1
            self._arrived[complete] = 0
            waiting = np.isin(self._lanes.blocks, complete) & (self._at >= _WAITING) & (self._at < _GONE)
            self._at[waiting] -= _WAITING


@functools.cache
def program(ptx: str, name: str) -> Program:
    """A kernel of a module, decoded once."""
    return Program(parse(ptx, name))


__all__ = ["WARP", "Program", "executed", "program"]
