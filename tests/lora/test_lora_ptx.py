"""LoRA's Triton kernels as the compiler makes them: their PTX is executed, for tensor cores too."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from tests.support.helpers import slow_but
from tests.support.lora_products import BF16, F16, F32, Case, Problem, assert_accurate, assert_same_weights, of_dtypes
from tests.support.ptx.triton import Device, PtxLora

KERNELS = {gpu: PtxLora(Device(gpu)) for gpu in ("sm_80", "sm_90")}
SIZES = Case(samples=(3, 5), tokens=20, d_in=72, d_out=40, rank=16)
CASES = [
    of_dtypes(BF16, BF16, BF16, BF16, SIZES),  # tensor cores; on sm_90 of a warpgroup
    of_dtypes(F32, F32, F32, F32, SIZES),
    of_dtypes(F16, F16, F16, F16, replace(SIZES, rank=8)),
    of_dtypes(BF16, F32, F32, BF16, replace(SIZES, rank=8)),
    of_dtypes(BF16, BF16, BF16, BF16, replace(SIZES, rank=20, d_in=70, d_out=18, shift=1)),
]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", slow_but(list(KERNELS), "sm_90"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(gpu: str, case: Case) -> None:
    assert_accurate(Problem(case), KERNELS[gpu])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_weights_have_the_bits_of_the_reference(dtype: object) -> None:
    case = of_dtypes(dtype, dtype, dtype, dtype, Case(samples=(131071, 0), d_in=24, d_out=24, rank=16))  # type: ignore[arg-type]
    assert_same_weights(case, KERNELS["sm_90"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_sizes_change_between_launches(dtype: object) -> None:
    """One compilation serves them all: 64 tokens and then 70 were what went wrong."""
    kernel = PtxLora()
    for tokens, d_in, d_out in ((64, 64, 64), (70, 72, 40), (17, 16, 48), (130, 32, 16)):
        case = replace(SIZES, samples=(1,), tokens=tokens, d_in=d_in, d_out=d_out)
        assert_accurate(Problem(of_dtypes(dtype, dtype, dtype, dtype, case)), kernel)  # type: ignore[arg-type]
    assert kernel.cached.cache_info().currsize == 2  # one of each kernel


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_of_warps_and_blocks(seed: int) -> None:
    problem = Problem(CASES[0])
    assert problem.run(PtxLora(Device(seed=seed))).equal(problem.run(KERNELS["sm_90"]))
