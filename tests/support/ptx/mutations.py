"""Faults put into the GPU kernels' sources, or into their PTX, that the tests must find."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.support.ptx.triton import ROOT


class Edit(NamedTuple):
    """A text in a file of the sources, and what takes its place."""

    file: str
    old: str
    new: str


KERNELS, MEMORY = "ivon_kernels/backends/triton_kernels.py", "ivon_kernels/backends/triton_memory.py"
LAUNCH, LORA = "ivon_kernels/backends/triton_launch.py", "ivon_kernels/lora/triton_kernels.py"

TRITON: dict[str, Edit] = {
    "an alignment that is not there": Edit(MEMORY, "if grad % 16 == 0:", "if grad % 4 == 0:"),
    "a mask left out": Edit(
        KERNELS, "ess, weight_decay), DTYPE), mask=mask)\n        begin", "ess, weight_decay), DTYPE))\n        begin"
    ),
    "a mask one too long": Edit(MEMORY, "mask = element < left", "mask = element <= left"),
    "the first block counts the step": Edit(KERNELS, "== tl.num_programs(0) - 1:", "== 0:"),
    "a counter that is not atomic": Edit(
        KERNELS,
        "if tl.atomic_add(block + 1, 1) == tl.num_programs(0) - 1:",
        "arrived = tl.load(block + 1)\n    tl.store(block + 1, arrived + 1)\n    if arrived == tl.num_programs(0) - 1:",
    ),
    "the finding of any block, not the first": Edit(
        KERNELS,
        "tl.atomic_min(at(control, tl.int64), tl.load(row + INDEX))",
        "tl.store(at(control, tl.int64), tl.load(row + INDEX))",
    ),
    "the last tail forgotten": Edit(MEMORY, "begin + BLOCK - 1) // BLOCK", "begin) // BLOCK"),
    "a quotient that is not rounded": Edit(
        "ivon_kernels/backends/triton_math.py",
        "mean + tl.div_rn(eps, tl.sqrt_rn((hess + weight_decay) * ess))",
        "mean + eps / tl.sqrt_rn((hess + weight_decay) * ess)",
    ),
}
"""In the Triton backend."""

SPECIALIZED = Edit(
    LAUNCH,
    'triton.jit(do_not_specialize=[p.name for p in parameters if "constexpr" not in str(p.annotation)])(function)',
    "triton.jit(function)",
)
"""Arguments are specialized on the first launch's values, as they once were."""

CUDA: dict[str, Edit] = {
    "an alignment that is not there": Edit(
        "csrc/cuda/launch.cu", "address % (dtype == IVON_FLOAT32 ? 16 : 8) == 0", "address % 4 == 0 || dtype > 9"
    ),
}
"""In the CUDA backend."""


def without_barrier(number: int) -> Callable[[str], str]:
    """The PTX without one of the barriers of each kernel."""

    def edit(ptx: str) -> str:
        kernels = ptx.split(".entry")
        for i, kernel in enumerate(kernels):
            parts = kernel.split("bar.sync")
            if len(parts) > number + 1:
                after = parts[number + 1]
                parts[number : number + 2] = [parts[number] + after[after.index(";") + 1 :]]
            kernels[i] = "bar.sync".join(parts)
        return ".entry".join(kernels)

    return edit


def mutated(folder: Path, edit: Edit) -> Path:
    """A copy of the sources with the edit in it."""
    for part in ("ivon_kernels", "csrc", "tests/support"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    path = folder / edit.file
    text = path.read_text()
    assert text.count(edit.old) == 1, (edit.old, text.count(edit.old))
    path.write_text(text.replace(edit.old, edit.new))
    return folder
