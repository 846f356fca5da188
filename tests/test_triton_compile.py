"""The Triton kernels' machine code for four GPUs, without a GPU: no spills, wide accesses, nothing contracted."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton")

from triton_code import BLOCK, GPUS, THREADS, Code, Job, compile_all

DTYPES = ("float32", "bfloat16", "float16")

# A step moves 32 bytes an element: it reads mean, momentum, hess and gradient, and writes mean, momentum, hess and
# weights. An H100 moves 3.35 TB/s, which is 105e9 elements/s, and issues 132 * 4 warp instructions a cycle, which is
# 29.7e12 instructions a second for single threads at 1.755 GHz: 283 for each element in the time of its memory traffic,
# 300 at the bandwidth reached in practice. A third of them is left for waiting and for what is outside the loop.
BUDGET = 200
REGISTERS = 128  # of 65536 in an SM: four programs of 128 threads at a time

STEP, STEP_AND_DRAW = ("float32", "float32", False, False), ("float32", "float32", False, True)


def _healthy(job: Job, code: Code) -> None:
    assert (code.spills, code.stack) == (0, 0), job
    assert code.contracted == 0, job
    if job.awkward:
        return
    assert code.conversions == 0, job
    assert code.registers <= REGISTERS, job
    assert code.path * THREADS / BLOCK < BUDGET, job
    # AMD's scalar registers may go to vector registers, but not in what trains float32 weights with one sample.
    assert code.scalar_spills <= (0 if job.flags in (STEP, STEP_AND_DRAW, ("float32",)) else 8), job


def _jobs(gpu: str) -> list[Job]:
    """What is compiled for every GPU, and the rest for one of each kind."""
    jobs = [Job("step", gpu, STEP), Job("step", gpu, STEP_AND_DRAW), Job("sample", gpu, ("float32",))]
    if gpu in ("sm_90", "gfx942"):
        jobs += [Job("normals", gpu, ()), Job("division", gpu, (2, 0)), Job("division", gpu, (12, 12))]
        jobs += [Job("step", gpu, (dtype, dtype, False, False)) for dtype in ("bfloat16", "float16")]
        jobs += [Job(kernel, gpu, ("float32",)) for kernel in ("restore", "check", "accumulate")]
        jobs += [Job("step", gpu, ("float32", "float32", True, False))]
        jobs += [Job("step", gpu, ("bfloat16", "bfloat16", True, True), True)]
    return jobs


def _not_contracted(gpu: str, found: dict[Job, Code]) -> None:
    """As many fused multiply-adds as square roots and divisions alone are made of."""
    for job, probe in (
        (Job("normals", gpu, ()), Job("division", gpu, (2, 0))),
        (Job("step", gpu, STEP_AND_DRAW), Job("division", gpu, (12, 12))),
    ):
        code, only = found[job], found[probe]
        assert (code.roots, code.quotients) == (only.roots, only.quotients)
        # A division of doubles looks at its result with one fma of float32.
        assert code.machine_fma == only.machine_fma + code.double_quotients


@pytest.mark.parametrize("gpu", GPUS)
def test_machine_code(gpu: str) -> None:
    found = compile_all(_jobs(gpu))
    for job, code in found.items():
        _healthy(job, code)
    # Accesses of 16 bytes to each tensor: a thread has 8 elements, or 4 where a warp has 64 threads.
    times = 1 if gpu.startswith("gfx") else BLOCK // THREADS // 4
    for flags in (STEP, STEP_AND_DRAW):  # mean, momentum, hess and gradient, and the weights to adopt
        code = found[Job("step", gpu, flags)]
        assert code.widest_loads >= 5 * times
        assert code.widest_stores == 4 * times
    sample = found[Job("sample", gpu, ("float32",))]
    assert sample.widest_loads >= 3 * times
    assert sample.widest_stores == 2 * times
    if gpu in ("sm_90", "gfx942"):
        _not_contracted(gpu, found)
        for dtype in ("bfloat16", "float16"):
            code = found[Job("step", gpu, (dtype, dtype, False, False))]
            assert code.widest_stores == 3 * times
            if gpu == "sm_90":
                assert code.rounding and all(name.startswith("cvt.rn.") for name in code.rounding.split())


def _every_job(gpu: str) -> list[Job]:
    """Every variant; gradients of another dtype than their parameter, which autograd does not make, for sm_90 alone."""
    jobs = []
    for awkward in (False, True):
        for kernel in ("sample", "restore", "check", "accumulate"):
            jobs += [Job(kernel, gpu, (dtype,), awkward) for dtype in DTYPES]
        flags = itertools.product(DTYPES, DTYPES, (False, True), (False, True))
        jobs += [Job("step", gpu, flag, awkward) for flag in flags if flag[0] == flag[1] or gpu == "sm_90"]
    return [job for job in jobs if job not in _jobs(gpu)]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
def test_every_variant(gpu: str) -> None:
    for job, code in compile_all(_every_job(gpu)).items():
        _healthy(job, code)
