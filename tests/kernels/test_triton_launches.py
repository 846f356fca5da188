"""One compilation of a Triton kernel serves every launch: no value of a run-time argument changes the code.

With an argument specialized, kernels that were first launched with 64 tokens and then with 70 wrote wrong rows.
"""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import ivon_kernels
from tests.support.triton_code import in_process
from tests.support.triton_launches import VALUES, Launched

BACKEND, LORA = "ivon_kernels.backends.triton_kernels", "ivon_kernels.lora.triton_kernels"
_WHOLE = {"AWKWARD": False, "SHARD": 0, "BLOCK": 1024}
_TILES = {"DTYPE": "bfloat16", "DOT_DTYPE": "bfloat16", "ALIGNED": True, "TOKENS": 64, "RANK": 16}
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "sample_kernel": (BACKEND, {"DTYPE": "float32", **_WHOLE}),
    "restore_kernel": (BACKEND, {"DTYPE": "float32", "AWKWARD": False, "BLOCK": 1024}),
    "check_kernel": (BACKEND, {"DTYPE": "float32", "AWKWARD": False, "BLOCK": 1024}),
    "accumulate_kernel": (BACKEND, {"DTYPE": "float32", **_WHOLE}),
    "step_kernel": (
        BACKEND,
        {"DTYPE": "float32", "GRAD_DTYPE": "float32", "SUMS": True, "DRAW_NEXT": True, **_WHOLE},
    ),
    "down_kernel": (LORA, {"X_DTYPE": "bfloat16", **_TILES, "COLUMNS": 64}),
    "up_kernel": (LORA, {"OUT_DTYPE": "bfloat16", "QUADS": True, **_TILES, "ROWS": 64}),
}


@functools.cache
def found() -> dict[str, Launched]:
    results = in_process("triton_launches", [(module, name, constants) for name, (module, constants) in JOBS.items()])
    return {name: Launched(*result) for name, result in zip(JOBS, results, strict=True)}


def test_no_kernel_is_left_out() -> None:
    sources = Path(inspect.getfile(ivon_kernels)).parent.rglob("*.py")
    kernels = [name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)]
    assert sorted(kernels) == sorted(JOBS)


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_run_time_arguments_are_not_specialized(name: str) -> None:
    assert found()[name].specialized == []


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_the_code_is_the_same_whatever_the_arguments_are(name: str) -> None:
    codes = found()[name].codes
    assert len(codes) == len(VALUES) and len(set(codes)) == 1
