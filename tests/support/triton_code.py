"""Ahead-of-time compilation of the Triton kernels, no GPU needed, and what the machine code shows.

Run as a program it compiles the jobs given on stdin (JSON) and prints what it found (JSON): Triton decides about its
interpreter when it is imported, and the process of the tests may have chosen that.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.kept import digest, kept

BLOCK = 1024
AWKWARD_BLOCK = 512
THREADS = 128
WHOLE, ALIGNED, ANY = range(3)  # of Job.shard
GPUS = ("sm_80", "sm_90", "sm_100", "gfx942")

# The constexpr arguments of each kernel, before AWKWARD, SHARD and BLOCK.
FLAGS = {
    "normals": (),
    "division": ("ROOTS", "QUOTIENTS"),
    "sample": ("DTYPE",),
    "restore": ("DTYPE",),
    "check": ("DTYPE",),
    "accumulate": ("DTYPE",),
    "step": ("DTYPE", "GRAD_DTYPE", "SUMS", "DRAW_NEXT"),
}


class Job(NamedTuple):
    """One compilation."""

    kernel: str
    gpu: str
    flags: tuple[Any, ...]
    awkward: bool = False
    shard: int = WHOLE


def block_of(job: Job) -> int:
    """The elements at a time, as ivon_kernels/backends/triton.py chooses them."""
    return AWKWARD_BLOCK if job.awkward or job.shard == ANY else BLOCK


class Code(NamedTuple):
    """What was found in the machine code."""

    registers: int
    spills: int  # to memory
    scalar_spills: int  # AMD: of scalar registers to vector registers
    stack: int
    shared: int
    contracted: int  # fma of floats in PTX; GCN has nothing like PTX
    machine_fma: int  # in the machine code, where division and square root are made of it
    roots: int  # square roots and divisions in PTX
    quotients: int
    double_quotients: int
    widest_loads: int  # of 16 bytes from global memory
    widest_stores: int
    conversions: int  # layouts changed through shared memory
    rounding: str  # how the weights are rounded
    path: int  # longest path of instructions through the loop, see hot_path
    seconds: float


def instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of the first function, and where its labels point."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"^(\.L\S+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            found.append(instruction[1])
    return found, labels


def _target(instruction: str, labels: dict[str, int]) -> int | None:
    match = re.search(r"\bBRA\b.*\((\.L[^)]*)\)", instruction)
    return None if match is None else labels[match[1]]


def hot_path(sass: str) -> int:
    """Instructions of the longest path through the kernel's main loop that calls no subroutine.

    Subroutines are the slow paths of division and square root, for operands outside the normal range. The main loop is
    the branch back that spans most. The longest path is one that price takes, adopts edits and loads gradients that are
    not aligned: more than any real one.
    """
    code, labels = instructions(sass)
    targets = [_target(instruction, labels) for instruction in code]
    loops = [(i - to, to, i) for i, to in enumerate(targets) if to is not None and to <= i]
    if not loops:
        return 0
    _, first, last = max(loops)
    longest: dict[int, int] = {last: 1}
    for i in range(last - 1, first - 1, -1):
        instruction, to = code[i], targets[i]
        following: list[int] = []
        if to is not None and first <= i < to <= last:
            following.append(to)
        if not (to is not None and re.match(r"^BRA(\.\w+)* `", instruction)) and not re.match(r"^EXIT", instruction):
            following.append(i + 1)
        lengths = [longest[j] for j in following if j in longest]
        if lengths and not instruction.startswith("CALL"):  # with a predicate it is how sm_80 leaves the loop
            longest[i] = 1 + max(lengths)
    return longest[first]


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _nvidia(compiled: Any, whole: bool) -> dict[str, Any]:
    """What PTX and the cubin's header say; with `whole` also the disassembly, which takes as long as ptxas."""
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder, "kernel.cubin"))
        Path(cubin).write_bytes(compiled.asm["cubin"])
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "-res-usage", cubin)))
        sass = _tool("nvdisasm", "-c", cubin) if whole else ""
    code, _ = instructions(sass)
    return {
        "registers": int(usage["REG"]),
        "spills": int(usage["LOCAL"]) + sum(bool(re.search(r"\b(LDL|STL)\b", instruction)) for instruction in code),
        "scalar_spills": 0,
        "double_quotients": ptx.count("div.rn.f64"),
        "stack": int(usage["STACK"]),
        "contracted": len(re.findall(r"\bfma\.\S*f(?:32|16|64)", ptx)) + len(re.findall(r"\bmad\.\S*f(?:32|64)", ptx)),
        "roots": ptx.count("sqrt.rn.f32"),
        "quotients": ptx.count("div.rn.f32"),
        "machine_fma": sum("FFMA" in instruction for instruction in code),
        "widest_loads": sum("LDG.E.128" in instruction for instruction in code),
        "widest_stores": sum("STG.E.128" in instruction for instruction in code),
        "rounding": " ".join(sorted(set(re.findall(r"cvt\.\w+\.(?:bf16|f16)\S*f32", ptx)))),
        "path": hot_path(sass),
    }


def _amd(compiled: Any) -> dict[str, Any]:
    gcn = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", gcn)[0])

    return {
        "registers": number("vgpr_count"),
        "scalar_spills": number("sgpr_spill_count"),
        "double_quotients": 0,
        "spills": number("vgpr_spill_count") + len(re.findall(r"\bscratch_(load|store)", gcn)),
        "stack": number("private_segment_fixed_size"),
        "contracted": 0,
        "machine_fma": len(re.findall(r"\bv_(?:pk_)?(?:fma|mad|fmac|mac)\w*_f32", gcn)),
        "roots": len(re.findall(r"\bv_sqrt_f32", gcn)),
        "quotients": len(re.findall(r"\bv_div_fixup_f32", gcn)),
        "widest_loads": len(re.findall(r"\b(?:global|buffer|flat)_load_dwordx4", gcn)),
        "widest_stores": len(re.findall(r"\b(?:global|buffer|flat)_store_dwordx4", gcn)),
        "rounding": "",
        "path": 0,
    }


def compiled_for(gpu: str, kernel: Any, constants: dict[str, Any]) -> Any:
    """A kernel whose arguments are int64 but for the constexpr ones."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ivon_kernels.backends.triton_launch import OPTIONS

    signature = {name: "constexpr" if name in constants else "i64" for name in kernel.arg_names}
    amd = gpu.startswith("gfx")
    target = GPUTarget("hip", gpu, 64) if amd else GPUTarget("cuda", int(gpu.removeprefix("sm_")), 32)
    return triton.compile(ASTSource(kernel, signature, constexprs=constants), target=target, options=dict(OPTIONS))


def looked_at(gpu: str, compiled: Any, *, whole: bool) -> dict[str, Any]:
    """Fields of Code; `whole`: those that a disassembly takes."""
    return _amd(compiled) if gpu.startswith("gfx") else _nvidia(compiled, whole)


def compile_job(job: Job) -> Code:
    """Compile one kernel and look at it."""
    import time

    import triton.language as tl

    from ivon_kernels.backends import triton_kernels
    from tests.support import triton_probes

    probe = job.kernel in ("normals", "division")
    kernel = getattr(triton_probes if probe else triton_kernels, f"{job.kernel}_kernel")
    flags = dict(zip(FLAGS[job.kernel], (getattr(tl, f) if isinstance(f, str) else f for f in job.flags), strict=True))
    constants = {**flags, "BLOCK": block_of(job)}
    if not probe:
        constants["AWKWARD"] = job.awkward
    if job.kernel in ("sample", "accumulate", "step"):
        constants["SHARD"] = job.shard
    start = time.perf_counter()
    compiled = compiled_for(job.gpu, kernel, constants)
    found = looked_at(job.gpu, compiled, whole=not job.awkward)
    seconds = time.perf_counter() - start
    conversions = compiled.asm["ttgir"].count("ttg.convert_layout")
    return Code(**found, shared=compiled.metadata.shared, conversions=conversions, seconds=seconds)


def in_process(module: str, jobs: Sequence[Any]) -> list[Any]:
    """What a module of this folder prints for the jobs (JSON), in a process of its own, with a cache of its own.

    It is kept: the process runs again when the jobs, Triton or a file with ``triton`` in its name is another.
    """
    import triton

    root = Path(__file__).parents[2]
    sources = [*(root / "ivon_kernels").rglob("*triton*.py"), *(root / "tests" / "support").glob("*triton*.py")]
    name = digest((jobs, triton.__version__), sources)
    found: list[Any] = json.loads(kept(f"{module}-{name}.json", functools.partial(_run, module, jobs)).read_text())
    return found


def _run(module: str, jobs: Sequence[Any], path: Path) -> None:
    with tempfile.TemporaryDirectory() as cache:
        result = subprocess.run(
            [sys.executable, "-m", f"tests.support.{module}"],
            input=json.dumps(jobs),
            env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr
    path.write_text(result.stdout)


def compile_all(jobs: Sequence[Job]) -> dict[Job, Code]:
    """Compile in a process of its own."""
    return dict(zip(jobs, (Code(*values) for values in in_process("triton_code", jobs)), strict=True))


def _main() -> None:
    jobs = [Job(kernel, gpu, tuple(flags), *others) for kernel, gpu, flags, *others in json.load(sys.stdin)]
    sys.stdout.write(json.dumps([compile_job(job) for job in jobs]))


if __name__ == "__main__":
    _main()
