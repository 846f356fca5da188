"""Registers without a value: found by looking at the code, followed while it runs.

As in valgrind's memcheck, what has no value may be passed on and computed with: compilers do so where nobody uses the
result, in the lanes of a reduction that has fewer values than threads, for example. It may not decide a branch, be a
predicate or an address, be stored, or enter what the threads of a warp compute together.
"""

from __future__ import annotations

import numpy as np

from tests.support.ptx.decode import names_in, results, sources
from tests.support.ptx.lanes import Array, Lanes, Run, mask_of
from tests.support.ptx.text import ENDS, Instruction, PtxError, Register, Vector

_USES = {"ld", "ldu", "st", "atom", "red", "cp", "redux", "vote", "wgmma", "mma", "ldmatrix", "stmatrix", *ENDS}


def followed(instruction: Instruction, missing: set[str]) -> list[str]:
    """What an instruction reads of the registers that may have no value; `missing` becomes what it is after it."""
    # LLVM packs halves that it does not need without ever giving them a value.
    packs = instruction.opcode == "mov" and isinstance(instruction.operands[1], Vector)
    unsure = [] if packs else [name for name in dict.fromkeys(sources(instruction)) if name in missing]
    if any(name in _passed_on(instruction) for name in unsure):
        missing.update(results(instruction))
    elif not instruction.predicate:
        missing.difference_update(results(instruction))
    return unsure


def _passed_on(instruction: Instruction) -> list[str]:
    """The registers without whose values the result has none, instead of being an error."""
    if instruction.opcode in _USES:
        return []
    if instruction.opcode == "shfl":
        return names_in(instruction.operands[1])
    read = sources(instruction)
    return read[:-1] if instruction.predicate else read


def watched(run: Run, instruction: Instruction, unsure: list[str], written: list[str]) -> Run:
    """What runs an instruction, with a look at registers that may have no value.

    Args:
        run: The instruction alone.
        instruction: Whose.
        unsure: What it reads of them.
        written: What it gives a value that is to be followed.
    """
    mask_for, passed_on = mask_of(instruction), _passed_on(instruction)
    exchanges = instruction.opcode == "shfl"

    def followed_run(lanes: Lanes) -> None:
        mask = mask_for(lanes) if instruction.predicate not in unsure else _all_assigned(lanes, instruction)
        valid = np.ones(lanes.count, dtype=bool)
        for name in unsure:
            assigned = lanes.assigned[name][lanes.numbers]
            if name not in passed_on and not (assigned if mask is None else assigned | ~mask).all():
                raise PtxError(f"register {name} has no value")
            if name not in lanes.values:
                _fill(lanes, name)
            valid &= assigned
        if exchanges and not valid.all():
            valid = _exchanged(lanes, instruction, run, valid)
        run(lanes)
        for name in written:
            before = lanes.assigned[name][lanes.numbers]
            lanes.assigned[name][lanes.numbers] = valid if mask is None else np.where(mask, valid, before)

    return followed_run


def _all_assigned(lanes: Lanes, instruction: Instruction) -> Array | None:
    """The mask of an instruction whose predicate must have a value in every thread."""
    if not lanes.assigned[instruction.predicate][lanes.numbers].all():
        raise PtxError(f"predicate {instruction.predicate} has no value")
    return mask_of(instruction)(lanes)


def _fill(lanes: Lanes, name: str) -> None:
    """Anything, so that a result that depends on it differs from run to run."""
    size = lanes.launch.entry.registers[name]
    anything = lanes.launch.order.integers(0, 256, (lanes.count, size), dtype=np.uint8).view(f"u{size}")[:, 0]
    lanes.values[name] = anything % 2 == 1 if name.startswith("%p") else anything


def _exchanged(lanes: Lanes, instruction: Instruction, run: Run, valid: Array) -> Array:
    """Which threads get a value from their neighbours: the exchange itself says it."""
    source, to = instruction.operands[1], instruction.operands[0]
    target_name = names_in(to)[0]
    if not isinstance(source, Register):
        raise PtxError(f"an exchange of what is no register: {instruction.text}")
    own = lanes.values[source.name]
    lanes.values[source.name] = valid.astype(np.uint32)
    run(lanes)
    received: Array = lanes.values[target_name].view(np.uint32) != 0
    lanes.values[source.name] = own
    return received
