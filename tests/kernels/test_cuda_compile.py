"""What nvcc makes of csrc/cuda, read without a GPU: no spills, wide accesses, nothing contracted, few instructions."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.kept import digest, kept

NVCC = shutil.which("nvcc")
pytestmark = [pytest.mark.skipif(NVCC is None, reason="no nvcc was found"), pytest.mark.slow]

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
FLAGS = ("-std=c++17", "--fmad=false", "-O3")
H100 = "sm_90"
ARCHITECTURES = ("sm_80", H100, "sm_100")
OPERATIONS = ("kSample", "kRestore", "kCheck", "kAccumulate", "kStep")
KERNELS = [f"kernel<{name}, SmallArguments>" for name in OPERATIONS]
KERNELS += [f"kernel<{name}, GatheredArguments>" for name in ("kSample", "kAccumulate", "kStep")]

# Issued instructions per element with float32 parameters and gradients, contiguous and aligned; the slow paths that a
# division or a square root takes for subnormal numbers do not count, the calls to them do.
#
# An H100 (SXM, 1.755 GHz) issues 132 * 4 * 32 * 1.755e9 = 29.7e12 instructions of one thread a second and moves 3.35e12
# bytes: below 8.8 instructions per byte the memory is what takes the time. Bytes per element: step 32 (gradient and
# weights once, three state tensors read and written), sample 12, accumulate 20.
PER_BYTE = 132 * 4 * 32 * 1.755e9 / 3.35e12
HOT = {  # name: (function, draw_next, arguments, bytes, budget of instructions, 128-bit loads, 128-bit stores)
    "step": ("step_quad", "false", "SmallArguments", 32, 145, 4, 4),
    "step_draw_next": ("step_quad", "true", "SmallArguments", 32, 230, 4, 4),
    "sample": ("sample_quad", "false", "SmallArguments", 12, 98, 2, 1),
    "accumulate": ("accumulate_quad", "false", "SmallArguments", 20, 72, 3, 2),
    "step_gathered": ("step_quad", "false", "GatheredArguments", 32, 155, 4, 4),
    "sample_gathered": ("sample_quad", "false", "GatheredArguments", 12, 105, 2, 1),
}

PROBE = """
#include "kernels.h"
using namespace ivon::scalar;
const void* kernels[] = {KERNELS};
inline __device__ void align(BlockContext&) {}
inline __device__ void align(GatheredContext& c) { c.aligned = true; }
// The body of a kernel as it is where nothing special is to be done.
#define HOT(name, function, next, Args)                                                                \\
  extern "C" __global__ void __launch_bounds__(kThreads, kResidentBlocks)                              \\
      hot_##name(const __grid_constant__ Args args) {                                                  \\
    __shared__ Args::Context shared;                                                                   \\
    if (threadIdx.x == 0) prepare<kStep>(args, blockIdx.x, shared);                                    \\
    __syncthreads();                                                                                   \\
    Args::Context c = shared;                                                                          \\
    align(c);                                                                                          \\
    c.scalars.gradsq = 0.0f;                                                                           \\
    c.tensor.word = (c.tensor.word & 0xffffff00u) | kParamVector | kGradVector;                        \\
    c.tensor.layout = nullptr;                                                                         \\
    c.skip = false;                                                                                    \\
    __builtin_assume(c.tensor.grad != nullptr);                                                        \\
    CallHeader call = args.call;                                                                       \\
    call.adopt = false;                                                                                \\
    call.draw_next = next;                                                                             \\
    function(call, c, c.begin + threadIdx.x * 4, 4);                                                   \\
  }
"""


class Compiled(NamedTuple):
    """What ptxas says, and the instructions of every kernel."""

    architecture: str
    report: str
    kernels: dict[str, list[str]]


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@functools.cache
def known_architectures() -> set[str]:
    return {line.replace("compute_", "sm_") for line in run(str(NVCC), "--list-gpu-arch").split()}


def find_cuobjdump() -> str:
    """The toolkit's, or the one that comes with Triton."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.exists() else None
    if found is None:
        pytest.skip("no cuobjdump was found, neither the CUDA toolkit's nor Triton's")
    return found


def probe(architecture: str) -> str:
    """Every kernel; the budgets of `HOT` are those of an H100."""
    text = PROBE.replace("KERNELS", ", ".join(f"reinterpret_cast<const void*>({kernel})" for kernel in KERNELS))
    hot = HOT if architecture == H100 else {}
    return text + "".join(f"HOT({name}, {', '.join(how[:3])})\n" for name, how in hot.items())


def made_by_nvcc(architecture: str, make: Callable[[tuple[str, ...], Path], str], what: str) -> str:
    """What `make` says of the probe, given nvcc's command line and a folder; kept, as a compilation takes 20 s."""
    if architecture not in known_architectures():
        pytest.skip(f"this nvcc does not know {architecture}")
    how = (run(str(NVCC), "--version"), FLAGS, architecture, probe(architecture), inspect.getsource(make))
    name = digest(how, [path for path in SOURCES.parent.rglob("*") if path.is_file()])

    def write(path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cu"
            source.write_text(probe(architecture))
            command = (str(NVCC), *FLAGS, f"-arch={architecture}", "-I", str(SOURCES), str(source))
            path.write_text(make(command, Path(folder)))

    return kept(f"cuda-{architecture}-{what}-{name}", write).read_text()


def to_ptx(command: tuple[str, ...], folder: Path) -> str:
    run(*command, "-ptx", "-o", str(folder / "probe.ptx"))
    return (folder / "probe.ptx").read_text()


def to_machine_code(command: tuple[str, ...], folder: Path) -> str:
    """JSON of what ptxas says, and of the instructions of every kernel by name, without operands' encodings."""
    cubin = folder / "probe.cubin"
    report = run(*command, "-Xptxas", "-v", "-Werror", "all-warnings", "-cubin", "-o", str(cubin))
    kernels: dict[str, list[str]] = {}
    for part in run(find_cuobjdump(), "-sass", str(cubin)).split("Function : ")[1:]:
        name, _, text = part.partition("\n")
        kernels[name.strip()] = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;", text, re.MULTILINE)
    return json.dumps([report, kernels])


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request: pytest.FixtureRequest) -> Compiled:
    return Compiled(request.param, *json.loads(made_by_nvcc(request.param, to_machine_code, "code")))


def test_nothing_spills(compiled: Compiled) -> None:
    architecture, report, _ = compiled
    sizes = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(sizes) >= len(KERNELS) + len(HOT) * (architecture == H100) and set(sizes) == {("0", "0", "0")}
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    assert max(registers) <= 80  # three blocks of 256 threads share 65536


@pytest.mark.parametrize("compiled", [H100], indirect=True)
def test_few_instructions_and_wide_accesses(compiled: Compiled) -> None:
    kernels = compiled.kernels
    for name, (*_, size, budget, loads, stores) in HOT.items():
        assert name == "step_draw_next" or budget < size * PER_BYTE  # that one saves a whole launch of `sample`
        code = kernels[f"hot_{name}"]
        begin = next(i for i, line in enumerate(code) if line.startswith("BAR.SYNC"))
        end = max(i for i, line in enumerate(code) if line == "EXIT")
        body = code[begin:end]
        assert len(body) / 4 <= budget, f"{name}: {len(body) / 4} instructions per element"
        accesses = [line for line in body if re.search(r"\b(LDG|STG|LD|ST)\.", line)]
        assert len(accesses) == loads + stores, accesses
        assert all(re.search(r"(LDG|STG)\.\S*\.128\b", line) for line in accesses), accesses


def test_kernels_read_and_write_128_bits(compiled: Compiled) -> None:
    """The kernels themselves, where the compiler has all the other cases to see to."""
    kernels = compiled.kernels
    for number, operation in enumerate(OPERATIONS):
        codes = [lines for name, lines in kernels.items() if f"OperationE{number}" in name]
        assert len(codes) == sum(f"<{operation}," in kernel for kernel in KERNELS)
        loads, stores = {"kSample": (2, 1), "kRestore": (1, 1), "kCheck": (1, 0), "kAccumulate": (3, 2)}.get(
            operation, (4, 4)
        )
        for code in codes:
            wide = {
                kind: sum(bool(re.search(rf"{kind}\.\S*\.128\b", line)) for line in code) for kind in ("LDG", "STG")
            }
            assert wide["LDG"] >= loads and wide["STG"] >= stores, (operation, wide)
            assert not any(re.search(r"\b(LDL|STL)\b", line) for line in code)


def test_nothing_is_contracted() -> None:
    text = made_by_nvcc(H100, to_ptx, "ptx")
    assert "mul.rn.f32" in text or "mul.f32" in text
    assert not re.findall(r"\bfma\.\S+|\bmad\.rn\.\S+|\S+\.ftz\S*|\S+\.approx\S*", text)
    assert {"div.rn.f32", "sqrt.rn.f32"} <= set(re.findall(r"\b(?:div|sqrt)\.\S+", text))
