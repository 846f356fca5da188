"""The Triton kernels' machine code for four GPUs, without a GPU: no spills, wide accesses, nothing contracted.

A compilation takes one to two seconds, and the flags of a step alone have 216 combinations. Compiled are, besides what
`_jobs` has for all GPUs:

- sm_90: `ORDINARY`, steps on whole tensors with gradients of their own dtype: every dtype with every value of every
  flag, and every pair of the flags' values;
- sm_80, sm_100, gfx942: `PLAIN` instead, which has every dtype and every pair of the flags' values. Registers and
  instructions are chosen per GPU, but what variants differ in comes from the same text and Triton's same passes;
- all: the other kernels by `SMALL`, with every dtype but `_jobs`'s float32, aligned and not;
- sm_90, gfx942: `SHARDED`, every pair of flags' values with each kind of shard, and gradients of another dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("triton")

from tests.support.triton_code import ALIGNED, ANY, BLOCK, GPUS, THREADS, WHOLE, Code, Job, block_of, compile_all

F32, BF16, F16 = DTYPES = ("float32", "bfloat16", "float16")
ONE_OF_EACH_KIND = ("sm_90", "gfx942")

# A step moves 32 bytes an element: it reads mean, momentum, hess and gradient, and writes mean, momentum, hess and
# weights. An H100 moves 3.35 TB/s, which is 105e9 elements/s, and issues 132 * 4 warp instructions a cycle, which is
# 29.7e12 instructions a second for single threads at 1.755 GHz: 283 for each element in the time of its memory traffic,
# 300 at the bandwidth reached in practice. A third of them is left for waiting and for what is outside the loop. Shards
# add the arithmetic of their indices, twice where the next sample is drawn; those that are not aligned may be slower.
BUDGET = {WHOLE: 200, ALIGNED: 230, ANY: 450}
REGISTERS = 128  # of 65536 in an SM: four programs of 128 threads at a time

STEP, STEP_AND_DRAW = (F32, F32, False, False), (F32, F32, False, True)

# Steps: dtype, gradient's dtype, SUMS, DRAW_NEXT, AWKWARD, SHARD.
PLAIN = (
    (F32, F32, False, True, True, WHOLE),
    (BF16, BF16, True, True, False, WHOLE),
    (F16, F16, True, False, True, WHOLE),
)
ORDINARY = (
    (F32, F32, False, False, False, WHOLE),
    (F32, F32, True, True, True, WHOLE),
    (BF16, BF16, False, True, True, WHOLE),
    (BF16, BF16, True, False, False, WHOLE),
    (F16, F16, False, True, False, WHOLE),
    (F16, F16, True, False, True, WHOLE),
)
SHARDED = (
    (F32, BF16, False, False, False, ALIGNED),
    (BF16, F16, False, True, True, ALIGNED),
    (F16, F16, True, False, True, ALIGNED),
    (F32, F32, True, True, True, ANY),
    (BF16, BF16, True, False, False, ANY),
    (F16, F32, False, True, False, ANY),
)
# The other kernels: dtype, AWKWARD.
SMALL = (
    *(("sample", BF16, True), ("restore", F16, True), ("check", BF16, True), ("accumulate", F16, True)),
    *(("sample", F16, False), ("restore", BF16, False), ("check", F16, False), ("accumulate", BF16, False)),
)


def _healthy(job: Job, code: Code) -> None:
    assert (code.spills, code.stack) == (0, 0), job
    assert code.contracted == 0, job
    if job.awkward:
        return
    assert code.conversions == 0, job
    assert code.registers <= REGISTERS, job
    assert code.path * THREADS / block_of(job) < BUDGET[job.shard], job
    # AMD's scalar registers may go to vector registers, but not in what trains whole float32 weights with one sample.
    ordinary = job.shard == WHOLE and job.flags in (STEP, STEP_AND_DRAW, (F32,))
    assert code.scalar_spills <= (0 if ordinary else 8 if job.shard == WHOLE else 32), job


def _jobs(gpu: str) -> list[Job]:
    """What is compiled for every GPU, and the rest for one of each kind."""
    jobs = [Job("step", gpu, STEP), Job("step", gpu, STEP_AND_DRAW), Job("sample", gpu, (F32,))]
    if gpu in ONE_OF_EACH_KIND:
        jobs += [Job("normals", gpu, ()), Job("division", gpu, (2, 0)), Job("division", gpu, (12, 12))]
        jobs += [Job("step", gpu, (dtype, dtype, False, False)) for dtype in (BF16, F16)]
        jobs += [Job(kernel, gpu, (F32,)) for kernel in ("restore", "check", "accumulate")]
        jobs += [Job("step", gpu, (F32, F32, True, False))]
        jobs += [Job("step", gpu, (BF16, BF16, True, True), True)]
        jobs += [Job("step", gpu, STEP_AND_DRAW, False, shard) for shard in (ALIGNED, ANY)]
        jobs += [Job("sample", gpu, (F32,), False, ALIGNED)]
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


@pytest.mark.parametrize("gpu", [pytest.param(gpu, marks=[pytest.mark.slow] * (gpu != "sm_80")) for gpu in GPUS])
def test_machine_code(gpu: str) -> None:
    found = compile_all(_jobs(gpu))
    for job, code in found.items():
        _healthy(job, code)
    # Accesses of 16 bytes to each tensor: a thread has 8 elements, or 4 where a warp has 64 threads.
    times = 1 if gpu.startswith("gfx") else BLOCK // THREADS // 4
    # Read are mean, momentum, hess and gradient, and the weights to adopt.
    wide = {STEP: (5, 4), STEP_AND_DRAW: (5, 4), (F32,): (3, 2)}
    for job, code in found.items():
        if job.kernel in ("step", "sample") and job.flags in wide and job.shard != ANY:
            loads, stores = wide[job.flags]
            assert code.widest_loads >= loads * times, job
            assert code.widest_stores == stores * times, job
    if gpu in ONE_OF_EACH_KIND:
        _not_contracted(gpu, found)
        for dtype in (BF16, F16):
            code = found[Job("step", gpu, (dtype, dtype, False, False))]
            assert code.widest_stores == 3 * times
            if gpu == "sm_90":
                assert code.rounding and all(name.startswith("cvt.rn.") for name in code.rounding.split())


def _more_jobs(gpu: str) -> list[Job]:
    """The variants that `_jobs` leaves out, as the module's docstring says."""
    steps = list(ORDINARY if gpu == "sm_90" else PLAIN)
    jobs = [Job(kernel, gpu, (dtype,), awkward) for kernel, dtype, awkward in SMALL]
    if gpu in ONE_OF_EACH_KIND:
        steps += SHARDED
        jobs += [Job("sample", gpu, (BF16,), True, ANY), Job("accumulate", gpu, (F16,), False, ANY)]
        jobs += [Job("accumulate", gpu, (BF16,), True, ALIGNED)]
    jobs += [Job("step", gpu, tuple(flags), awkward, shard) for *flags, awkward, shard in steps]
    return [job for job in jobs if job not in _jobs(gpu)]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
def test_variants(gpu: str) -> None:
    for job, code in compile_all(_more_jobs(gpu)).items():
        _healthy(job, code)


def test_the_variants_cover() -> None:
    """Every value of a flag of the step with every value of every other; in `PLAIN` the dtype is left out."""
    booleans = [(False, True)] * 3
    _assert_pairs([flags[2:5] for flags in (*PLAIN, (*STEP, False), (*STEP_AND_DRAW, False))], booleans)
    _assert_pairs([(dtype, *flags[:3]) for dtype, _, *flags in ORDINARY], [DTYPES, *booleans])
    _assert_pairs([(dtype, *flags) for dtype, _, *flags in SHARDED], [DTYPES, *booleans, (ALIGNED, ANY)])
    assert {flags[0] for flags in PLAIN} == {flags[1] for flags in SHARDED} == set(DTYPES)
    kernels = ("sample", "restore", "check", "accumulate")
    _assert_pairs(list(SMALL), [kernels, (BF16, F16), (False, True)])


def _assert_pairs(rows: Sequence[Sequence[Any]], values: Sequence[Sequence[Any]]) -> None:
    for a, b in itertools.combinations(range(len(values)), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(values[a], values[b])), (a, b)
