"""Compiles Triton's kernels to PTX as their first launch would, without a GPU and without a machine code.

Run as a program it takes jobs from stdin (JSON, one a line) and answers each with PTX and the bytes of shared memory.
Triton decides about its interpreter when it is imported, and the process of the tests may have chosen that.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.machinery import PathFinder
from typing import Any

from tests.support.triton_launches import driver_of


def _only_ptx() -> None:
    """No assembler: it takes as long as all the rest."""
    from triton.backends.nvidia.compiler import CUDABackend

    CUDABackend.make_cubin = lambda *args, **options: b""


def compile_job(job: dict[str, Any]) -> tuple[str, int]:
    """One job: module, kernel, gpu, flags (dtypes by name), the first launch's arguments, options."""
    import triton.language as tl
    from triton.runtime import driver

    driver.set_active(driver_of(job["gpu"]))
    kernel = getattr(importlib.import_module(job["module"]), job["kernel"])
    flags = [getattr(tl, value) if isinstance(value, str) else value for value in job["flags"]]
    kernel.device_caches.clear()  # of another GPU
    compiled = kernel.warmup(*job["arguments"], *flags, grid=(1,), **job["options"])
    return compiled.asm["ptx"], compiled.metadata.shared


def _main() -> None:
    # The sources in this folder, also where another checkout is installed in its place (pip install -e).
    sys.meta_path.insert(0, PathFinder)
    _only_ptx()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(compile_job(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
