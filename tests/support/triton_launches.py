"""What Triton's own launch compiles for given run-time arguments, without a GPU.

Run as a program it compiles each kernel given on stdin (JSON: module, name, constexpr arguments) with all run-time
arguments 17 and with all 32, the way a launch does, and prints both codes and which parameters may be specialized
(JSON). Triton decides about its interpreter when it is imported, and the process of the tests may have chosen that.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

VALUES = (17, 32)  # of 32 Triton knows that 16 divides it


class Launched(NamedTuple):
    """What was found of one kernel."""

    specialized: list[str]  # run-time parameters of which values are looked at
    codes: list[str]  # hashes of the PTX, one for each of VALUES


def driver_of(gpu: str) -> Any:
    """As much of a driver of a GPU (``sm_90``) as a launch asks before it compiles."""
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", int(gpu.removeprefix("sm_")), 32)
    return SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )


def look(module: str, name: str, constants: dict[str, Any]) -> Launched:
    """Compile as a launch does."""
    import triton.language as tl
    from triton.runtime import driver

    from ivon_kernels.backends.triton_launch import OPTIONS

    driver.set_active(driver_of("sm_90"))
    kernel = getattr(importlib.import_module(module), name)
    flags = {key: getattr(tl, value) if isinstance(value, str) else value for key, value in constants.items()}
    names = [param.name for param in kernel.params if not param.is_constexpr]
    specialized = [param.name for param in kernel.params if not (param.is_constexpr or param.do_not_specialize)]
    codes = []
    for value in VALUES:
        compiled = kernel.warmup(**dict.fromkeys(names, value), **flags, grid=(1,), **OPTIONS)
        codes.append(hashlib.sha256(compiled.asm["ptx"].encode()).hexdigest())
    return Launched(specialized, codes)


if __name__ == "__main__":
    sys.stdout.write(json.dumps([look(*job) for job in json.load(sys.stdin)]))
