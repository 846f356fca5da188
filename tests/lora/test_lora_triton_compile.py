"""Machine code of the kernels of several LoRA samples, without a GPU: no spills, 16 bytes a load, tensor cores.

Rank 8 is padded for the tensor cores, 16 fits, 64 is the widest tile: a rank of 256 takes the same code four times.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.support.triton_code import GPUS
from tests.support.triton_lora_code import THREADS, Code, Job, compile_all

F32, BF16 = "float32", "bfloat16"
# Of the usual types: a model in bfloat16 has adapters in bfloat16 or, which is PEFT's default, in float32.
JOBS = {
    "sm_80": [
        Job("down", "sm_80", BF16, BF16, 8),
        Job("up", "sm_80", BF16, BF16, 64),
        Job("down", "sm_80", BF16, F32, 32),
        Job("up", "sm_80", F32, F32, 8),
    ],
    "sm_90": [
        *(Job(kernel, "sm_90", BF16, BF16, 16) for kernel in ("down", "up")),
        *(Job(kernel, "sm_90", BF16, F32, 16) for kernel in ("down", "up")),
        Job("down", "sm_90", BF16, BF16, 256),
    ],
    "sm_100": [
        Job("down", "sm_100", BF16, BF16, 64),
        Job("up", "sm_100", BF16, BF16, 16),
        Job("up", "sm_100", BF16, F32, 32),
    ],
    "gfx942": [
        Job("down", "gfx942", BF16, BF16, 16),
        Job("up", "gfx942", BF16, BF16, 64),
        Job("down", "gfx942", F32, F32, 32),
    ],
}
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
REGISTERS = 168  # of 65536 in an SM: three programs of 128 threads at a time
SHARED = 99 * 1024  # bytes: all that a program may have on the smallest GPUs of NVIDIA's; AMD has 64 KiB


def _healthy(job: Job, code: Code) -> None:
    assert (code.spills, code.stack) == (0, 0), job
    assert code.registers <= REGISTERS, job
    assert code.shared <= (64 * 1024 if job.gpu == "gfx942" else SHARED), job
    if job.dtype == BF16 or job.gpu == "gfx942":
        assert code.matrix and all(TENSOR_CORES[job.gpu] in name for name in code.matrix), (job, code)
    if job.gpu == "gfx942":
        assert code.wide > 0, job
        return
    assert (code.narrow, code.wide > 0) == (0, True), (job, code)
    assert job.kernel == "down" or code.narrow_stores == 0, (job, code)  # h is written once and small
    # A root for two normals, a division for each weight, and multiply-adds where the product has them.
    noise = job.elements // THREADS
    if job.gpu == "sm_100" and job.kernel == "down" and job.dtype == BF16:
        noise *= 2  # the first tile is before the loop
    assert (code.roots, code.quotients, code.approximate) == (noise // 2, noise, 0), (job, code)
    products = 0 if job.dtype == BF16 else job.multiplications // THREADS
    if job.gpu == "sm_100":  # some of the first products are without an addition
        assert code.contracted <= products, (job, code)
    else:
        assert code.contracted == products, (job, code)


@pytest.mark.parametrize("gpu", [pytest.param(gpu, marks=[pytest.mark.slow] * (gpu != "sm_100")) for gpu in GPUS])
def test_machine_code(gpu: str) -> None:
    for job, code in compile_all(JOBS[gpu]).items():
        _healthy(job, code)
