"""The C++ backend against the reference: the same bits for every SIMD level, thread count, dtype, stride and tail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ivon_kernels import IVON, available_backends, noise
from ivon_kernels.backends import cpu
from tests.support.helpers import slow_but
from tests.support.matrix import CPU, Case, assert_has_the_bits_of_the_reference

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=f"the cpu backend is missing: {available_backends()['cpu']}"
)
LEVELS = cpu.simd_levels() if available_backends()["cpu"] is None else []
SIZES = (0, 1, 3, 4, 5, 7, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 5000)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.simd_level()
    cpu.set_simd_level(request.param)
    yield request.param
    cpu.set_simd_level(before)


# ---- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("numel", SIZES)
def test_noise_has_the_bits_of_the_specification(level: str, threads: int, numel: int) -> None:
    stream: dict[str, Any] = {"seed": 2**64 - 3, "step": 17, "sample": 5, "replica": 3, "param": 2**24 - 1}
    for start in (0, 1, 2, 3, 1023):
        stream["sample"] ^= noise.MIRROR
        drawn = cpu.normals(numel, start=start, threads=threads, **stream)
        assert torch.equal(drawn.view(torch.int32), noise.normals(numel, start=start, **stream).view(torch.int32))


@pytest.mark.parametrize("start", [2**32 - 500, 2**34 - 500, 2**34 - 501, 2**34 - 2049, 2**42 - 1000])
def test_noise_of_huge_tensors(level: str, start: int) -> None:
    numel = min(3000, 2**42 - start)
    drawn = cpu.normals(numel, seed=1, step=noise.EVAL_STEP, start=start, threads=2)
    assert torch.equal(drawn, noise.normals(numel, seed=1, step=noise.EVAL_STEP, start=start))


def test_a_million_normals(level: str) -> None:
    assert torch.equal(cpu.normals(2**20 + 3, seed=99, step=0), noise.normals(2**20 + 3, seed=99, step=0))


# ---- training: tests/kernels/test_backend_matrix.py has the rest ----------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "gradsq"])
@pytest.mark.parametrize("dtype", slow_but(["float32", "bfloat16", "float16"], "bfloat16"))
def test_levels_and_threads_give_the_same_bits(level: str, dtype: str, variant: str) -> None:
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        assert_has_the_bits_of_the_reference(CPU, Case(dtype, "strided", 2, variant))


@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
def test_update_against_float64(hess_approx: str) -> None:
    """Tolerance rule: error against float64 at most twice the reference's own."""
    errors = {}
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(10_000, generator=generator)
    grads = [torch.randn(10_000, generator=generator) for _ in range(20)]
    runs = {}
    for backend, dtype in (("reference", torch.float64), ("reference", torch.float32), ("cpu", torch.float32)):
        p = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer = IVON([p], 0.1, 100.0, 0.5, beta2=0.99, seed=4, backend=backend, hess_approx=hess_approx)
        for grad in grads:
            optimizer.train()
            p.grad = grad.to(dtype)
            optimizer.step()
        runs[backend, dtype] = {key: optimizer.state[p][key].double() for key in ("mean", "momentum", "hess")}
    exact = runs["reference", torch.float64]
    for key, value in exact.items():
        for backend in ("reference", "cpu"):
            errors[backend] = float((runs[backend, torch.float32][key] - value).abs().max())
        assert errors["cpu"] <= 2 * errors["reference"]
        assert errors["reference"] < 1e-4 * float(value.abs().max())  # 20 steps of float32 rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_casts_are_torchs(dtype: torch.dtype) -> None:
    """Every 16-bit pattern read as a gradient, and the rounding of float32 extremes written to a parameter."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    finite = patterns[torch.isfinite(patterns)]
    p = torch.nn.Parameter(torch.zeros(finite.numel(), dtype=dtype))
    optimizer = IVON([p], lr=0.0, ess=1.0, beta1=0.0, seed=0, backend="cpu")
    optimizer.train()
    p.grad = finite
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum"], finite.float())

    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    values = bits.view(torch.float32)
    extremes = torch.tensor([0.0, -0.0, 65504.0, 65519.9, 65520.0, 2.0**-24, 2.0**-25, 3.1e-8, 6.1e-5, 3.4e38, -1e-45])
    values = torch.cat((values[torch.isfinite(values)], extremes))
    p = torch.nn.Parameter(torch.zeros(values.numel(), dtype=dtype))
    optimizer = IVON([p], lr=0.0, ess=1.0, seed=0, backend="cpu")
    optimizer.train()
    optimizer.state[p]["mean"].copy_(values)
    optimizer.eval()
    assert torch.equal(p.detach().view(torch.int16), values.to(dtype).view(torch.int16))


def test_kept_noise_is_never_used_for_another_sample() -> None:
    """Evaluation samples, another seed or a replayed step in between do not reach the update."""
    results = []
    for disturb in (False, True):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 100))
        optimizer = IVON([p], 0.1, 10.0, seed=1, backend="cpu")
        for _ in range(3):
            optimizer.train()
            if disturb:
                with optimizer.sampled_params(sample=3):
                    pass
                optimizer.eval()
                optimizer.train()
            p.grad = torch.ones(100)
            optimizer.step()
        results.append(optimizer.state[p]["hess"].clone())
    assert torch.equal(*results)


def test_unknown_simd_level() -> None:
    with pytest.raises(ValueError, match="avx9000"):
        cpu.set_simd_level("avx9000")


@pytest.mark.slow
def test_simd_variable_is_honoured_and_checked() -> None:
    code = "import ivon_kernels as k; from ivon_kernels.backends import cpu; r = k.available_backends()['cpu']; "
    code += "print(r or cpu.simd_level())"
    for value, expected in (("baseline" if "baseline" in LEVELS else LEVELS[-1], LEVELS[-1]), ("nonsense", "nonsense")):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, cpu.SIMD_VARIABLE: value},
            capture_output=True,
            text=True,
            check=True,
        )
        assert expected in run.stdout
