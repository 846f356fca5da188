"""Ahead-of-time compilation of the kernels of several LoRA samples; triton_code.py says how and why."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from ivon_kernels.lora import triton as host
from tests.support.triton_code import compiled_for, in_process, looked_at

THREADS = 128


class Job(NamedTuple):
    """One compilation."""

    kernel: str  # down or up
    gpu: str
    x: str  # dtype of x or out
    weights: str  # dtype of A or B
    rank: int
    tokens: int = 64
    aligned: bool = True

    @property
    def dtype(self) -> str:
        """Of the products."""
        return self.x if self.x == self.weights else "float32"

    @property
    def tiles(self) -> host._Tiles:
        """As in production; under the interpreter they are smaller."""
        import torch

        interpreted, host.interpreted = host.interpreted, lambda: False
        try:
            return host._tiles(self.tokens, self.rank, getattr(torch, self.dtype))
        finally:
            host.interpreted = interpreted

    @property
    def elements(self) -> int:
        """Of a tile of noise."""
        return self.tiles.rank * (self.tiles.down if self.kernel == "down" else self.tiles.up)

    @property
    def multiplications(self) -> int:
        """Of a tile's product; the inner dimension is at least 16."""
        return self.elements * self.tiles.tokens * (2 if self.kernel == "up" and self.tiles.rank == 8 else 1)


class Code(NamedTuple):
    """What was found in the machine code."""

    registers: int
    spills: int
    stack: int
    shared: int
    contracted: int  # fma of floats in PTX
    roots: int
    quotients: int
    approximate: int  # divisions and roots in PTX that are not rounded correctly
    wide: int  # loads of 16 bytes from global memory, and copies from there: in PTX, or in GCN
    narrow: int  # others
    narrow_stores: int
    matrix: tuple[str, ...]  # instructions of tensor cores


def compile_job(job: Job) -> Code:
    """Compile one kernel and look at it."""
    import triton.language as tl

    from ivon_kernels.lora import triton_kernels

    tiles = job.tiles
    constants = {
        "DTYPE": getattr(tl, job.weights),
        "DOT_DTYPE": getattr(tl, job.dtype),
        "ALIGNED": job.aligned,
        "TOKENS": tiles.tokens,
        "RANK": tiles.rank,
    }
    if job.kernel == "down":
        constants |= {"X_DTYPE": getattr(tl, job.x), "COLUMNS": tiles.down}
    else:
        constants |= {"OUT_DTYPE": getattr(tl, job.x), "QUADS": job.aligned, "ROWS": tiles.up}
    compiled = compiled_for(job.gpu, getattr(triton_kernels, f"{job.kernel}_kernel"), constants)
    found = looked_at(job.gpu, compiled, whole=False)
    common = (found["registers"], found["spills"] + found["scalar_spills"], found["stack"], compiled.metadata.shared)
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    accesses = _amd_accesses(text) if job.gpu.startswith("gfx") else _nvidia_accesses(text)
    approximate = len(re.findall(r"\b(?:div|sqrt)\.(?:full|approx)\S*f32", text))
    matrix = re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma)\S*", text)
    exact = (found["contracted"], found["roots"], found["quotients"], approximate)
    return Code(*common, *exact, *accesses, tuple(sorted(set(matrix))))


def _nvidia_accesses(ptx: str) -> tuple[int, int, int]:
    """Wide and narrow loads, narrow stores."""
    vector = r"\.v(?:4\.[bfu]32|2\.[bfu]64)\b"
    loads = [re.search(vector, line) for line in re.findall(r"\bld\.global.*", ptx)]
    copies = [line.count(" 0x10") for line in re.findall(r"\bcp\.async\.\w+\.shared.*", ptx)]
    stores = [re.search(vector, line) for line in re.findall(r"\bst\.global.*", ptx)]
    wide = sum(map(bool, [*loads, *copies]))
    return wide, len(loads) + len(copies) - wide, stores.count(None)


def _amd_accesses(gcn: str) -> tuple[int, int, int]:
    moves = re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", gcn)
    loads, stores = ([width for kind, width in moves if kind == wanted] for wanted in ("load", "store"))
    wide = [width for width in loads if "x4" in width]
    return len(wide), len(loads) - len(wide), sum("x4" not in width for width in stores)


def compile_all(jobs: Sequence[Job]) -> dict[Job, Code]:
    """Compile in a process of its own."""
    return dict(zip(jobs, (Code(*values) for values in in_process("triton_lora_code", jobs)), strict=True))


def _main() -> None:
    jobs: list[Any] = [Job(*fields) for fields in json.load(sys.stdin)]
    sys.stdout.write(json.dumps([compile_job(job) for job in jobs]))


if __name__ == "__main__":
    _main()
