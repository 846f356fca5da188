"""The C++ kernel of several LoRA samples: against float64, the weights' bits, every SIMD level, thread and shape."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ivon_kernels import available_backends, noise
from ivon_kernels.backends import cpu as backend
from ivon_kernels.lora import cpu
from ivon_kernels.lora.op import Factor

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=f"the cpu backend is missing: {available_backends()['cpu']}"
)
LEVELS = backend.simd_levels() if available_backends()["cpu"] is None else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = 2**64 - 3
SAMPLES = (5, 2**16 - 1, 0, 7)
SCALING = 0.7


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = backend.simd_level()
    backend.set_simd_level(request.param)
    yield request.param
    backend.set_simd_level(before)


def factor(rows: int, columns: int, index: int, dtype: torch.dtype = torch.float32) -> Factor:
    """Weights of about the size that keeps activations near 1, with noise of a tenth of that."""
    generator = torch.Generator().manual_seed(index)
    size = columns**-0.5
    mean = size * torch.randn(rows, columns, generator=generator)
    inv_sigma = (5 + 10 * torch.rand(rows, columns, generator=generator)) / size
    return Factor(mean, inv_sigma, index, dtype)


def unit(size: int) -> Factor:
    """The unit matrix, without noise."""
    return Factor(torch.eye(size), torch.full((size, size), math.inf), 0, torch.float32)


def weights(of: Factor, sample: int) -> Tensor:
    """The specification: ``round(mean + eps / inv_sigma)``, as float64."""
    eps = noise.normals(of.mean.numel(), seed=SEED, step=noise.EVAL_STEP, sample=sample, param=of.index)
    return (of.mean + eps.view_as(of.mean) / of.inv_sigma).to(of.dtype).double()


def inputs(tokens: int, a: Factor, b: Factor, count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """``out`` and ``x`` of `count` samples."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count * tokens, a.mean.shape[1], generator=generator).to(dtype)
    return torch.randn(count * tokens, b.mean.shape[0], generator=generator).to(dtype), x


def plain(out: Tensor, x: Tensor, a: Factor, b: Factor, samples: Sequence[int], compute: torch.dtype) -> Tensor:
    """The equation in PyTorch, computed in `compute` and rounded to ``out``'s dtype unless that is float64."""
    parts = []
    for o, part, sample in zip(out.chunk(len(samples)), x.chunk(len(samples)), samples, strict=True):
        hidden = part.to(compute) @ weights(a, sample).to(compute).T
        parts.append(o.to(compute) + SCALING * (hidden @ weights(b, sample).to(compute).T))
    result = torch.cat(parts)
    return result if compute == torch.float64 else result.to(out.dtype)


def kernel(out: Tensor, x: Tensor, a: Factor, b: Factor, samples: Sequence[int]) -> Tensor:
    """A new tensor with what the kernel makes of ``out``."""
    out = out.clone()
    assert cpu.unsupported(out, x, a, b) is None
    cpu.lora_samples_(out, x, a, b, SCALING, SEED, samples)
    return out


# Tokens, d_in, d_out, rank, samples. The last three have more columns, tokens or ranks than are taken at a time.
SHAPES = (
    (32, 576, 192, 8, 4),
    (7, 37, 53, 3, 3),
    (1, 1, 1, 1, 1),
    (3, 65, 130, 64, 2),
    (3, 64, 48, 256, 2),
    (5, 2100, 1100, 1, 2),
    (1030, 20, 20, 256, 1),
    (2, 40, 40, 700, 2),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_float64(level: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    """Tolerance rule: at most twice the error of the same computation in PyTorch's float32."""
    tokens, d_in, d_out, rank, count = shape
    a, b = factor(rank, d_in, 1, dtype), factor(d_out, rank, 2, dtype)
    out, x = inputs(tokens, a, b, count, dtype)
    exact = plain(out, x, a, b, SAMPLES[:count], torch.float64)
    allowed = (plain(out, x, a, b, SAMPLES[:count], torch.float32).double() - exact).norm()
    assert (kernel(out, x, a, b, SAMPLES[:count]).double() - exact).norm() <= 2 * allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 37), (8, 64), (70, 130), (5, 1100), (30, 1024)])
def test_the_weights_have_the_bits_of_the_specification(
    level: str, rows: int, columns: int, dtype: torch.dtype
) -> None:
    """Products with 0 and 1 are exact: with unit matrices for x and the other factor, `out` shows A_s or B_s itself."""
    x = torch.eye(columns).repeat(len(SAMPLES), 1)
    a = factor(rows, columns, 2**24 - 1, dtype)
    out = torch.zeros(len(SAMPLES) * columns, rows)
    cpu.lora_samples_(out, x, a, unit(rows), 1.0, SEED, SAMPLES)
    for sample, shown in zip(SAMPLES, out.chunk(len(SAMPLES)), strict=True):
        assert torch.equal(shown.T.double(), weights(a, sample))

    b = factor(columns, rows, 2**24 - 2, dtype)
    x = torch.eye(rows).repeat(len(SAMPLES), 1)
    out = torch.zeros(len(SAMPLES) * rows, columns)
    cpu.lora_samples_(out, x, unit(rows), b, 1.0, SEED, SAMPLES)
    for sample, shown in zip(SAMPLES, out.chunk(len(SAMPLES)), strict=True):
        assert torch.equal(shown.T.double(), weights(b, sample))


@pytest.mark.parametrize(("tokens", "count"), [(1, 4), (5, 3), (100, 1), (101, 3), (1, 1)])
def test_threads_give_the_same_bits(level: str, tokens: int, count: int) -> None:
    """However the tokens are shared out: whole samples for a thread, or parts of them."""
    a, b = factor(12, 1100, 1), factor(230, 12, 2)
    out, x = inputs(tokens, a, b, count)
    results = []
    for threads in (1, 2, 4, 7):
        torch.set_num_threads(threads)
        results.append(kernel(out, x, a, b, SAMPLES[:count]))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_has_the_same_bits_in_any_batch(level: str, dtype: torch.dtype) -> None:
    a, b = factor(9, 75, 1, dtype), factor(61, 9, 2, dtype)
    out, x = inputs(11, a, b, len(SAMPLES), dtype)
    together = kernel(out, x, a, b, SAMPLES).view(len(SAMPLES), 11, 61)
    for s, sample in enumerate(SAMPLES):
        for rows in (slice(0, 11), slice(2, 7), slice(10, 11)):
            part_out, part_x = out.view(len(SAMPLES), 11, 61)[s, rows], x.view(len(SAMPLES), 11, 75)[s, rows]
            assert torch.equal(kernel(part_out, part_x, a, b, [sample]), together[s, rows])


def test_without_noise_every_sample_is_the_mean(level: str) -> None:
    """Infinite 1 / sigma, also of single elements."""
    a, b = factor(8, 40, 1), factor(30, 8, 2)
    a.inv_sigma.fill_(math.inf)
    b.inv_sigma[::2] = math.inf
    out, x = inputs(6, a, b, 1)
    first, second = kernel(out.repeat(2, 1), x.repeat(2, 1), a, b, SAMPLES[:2]).chunk(2)
    assert torch.equal(first[:, ::2], second[:, ::2])
    assert not torch.isclose(first[:, 1::2], second[:, 1::2], rtol=1e-6, atol=0).all(0).any()
    exact = out.double() + SCALING * (x.double() @ a.mean.double().T @ b.mean.double().T)
    torch.testing.assert_close(first[:, ::2].double(), exact[:, ::2], rtol=1e-5, atol=1e-5)


def test_one_token_s_nan_reaches_no_other_token_and_no_later_call(level: str) -> None:
    a, b = factor(5, 19, 1), factor(21, 5, 2)
    out, x = inputs(7, a, b, 2)
    clean = kernel(out, x, a, b, SAMPLES[:2])
    poisoned = x.clone()
    poisoned[6] = math.nan
    dirty = kernel(out, poisoned, a, b, SAMPLES[:2])
    assert dirty[6].isnan().all()
    dirty[6] = clean[6]
    assert torch.equal(dirty, clean)
    assert torch.equal(kernel(out, x, a, b, SAMPLES[:2]), clean)


@pytest.mark.parametrize(("tokens", "d_in", "d_out", "rank"), [(0, 4, 4, 2), (3, 4, 4, 0), (3, 4, 0, 2), (3, 0, 4, 2)])
def test_nothing_to_add(tokens: int, d_in: int, d_out: int, rank: int) -> None:
    empty = torch.empty
    a = Factor(empty(rank, d_in), empty(rank, d_in), 1, torch.float32)
    b = Factor(empty(d_out, rank), empty(d_out, rank), 2, torch.float32)
    out = torch.randn(2 * tokens, d_out)
    assert torch.equal(kernel(out, empty(2 * tokens, d_in), a, b, SAMPLES[:2]), out)
    assert torch.equal(kernel(out[:0], empty(0, d_in), a, b, []), out[:0])


@pytest.mark.slow
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (9, 70, 120, 40))),
    count=st.integers(1, len(SAMPLES)),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 4),
    which=st.sampled_from(LEVELS or ["none"]),
    threads=st.integers(1, 3),
)
def test_any_shape_and_mix_of_dtypes(
    shape: tuple[int, ...], count: int, dtypes: tuple[torch.dtype, ...], which: str, threads: int
) -> None:
    """Within the bound of float32 sums, and nothing is written beside `out`.

    A sum of n products is off by at most n u times the sum of their absolute values (Higham, section 3.1; u = 2^-24):
    here n = d_in + rank + 3 (the scaling, the addition and the sum's first rounding). `out` is then rounded once.
    """
    tokens, d_in, d_out, rank = shape
    out_dtype, x_dtype, a_dtype, b_dtype = dtypes
    a, b = factor(rank, d_in, 1, a_dtype), factor(d_out, rank, 2, b_dtype)
    out, x = inputs(tokens, a, b, count)
    out, x, samples = out.to(out_dtype), x.to(x_dtype), SAMPLES[:count]
    exact = plain(out, x, a, b, samples, torch.float64)
    sizes = []
    for o, part, sample in zip(out.chunk(count), x.chunk(count), samples, strict=True):
        hidden = part.double().abs() @ weights(a, sample).abs().T
        sizes.append(o.double().abs() + SCALING * (hidden @ weights(b, sample).abs().T))
    bound = (d_in + rank + 3) * 2**-24 * torch.cat(sizes)
    info = torch.finfo(out_dtype)
    bound = bound * (1 + info.eps) + info.eps / 2 * exact.abs() + info.smallest_normal * info.eps

    guard = 64
    room = torch.full((guard + out.numel() + guard,), 12345.0, dtype=out_dtype)
    inside = room[guard : guard + out.numel()].view_as(out).copy_(out)
    before = backend.simd_level()
    backend.set_simd_level(which)
    torch.set_num_threads(threads)
    cpu.lora_samples_(inside, x, a, b, SCALING, SEED, samples)
    backend.set_simd_level(before)
    assert bool(((inside.double() - exact).abs() <= bound).all())
    assert len(room[:guard].unique()) == len(room[-guard:].unique()) == 1


def test_refusals() -> None:
    a, b = factor(2, 6, 1), factor(4, 2, 2)
    out, x = inputs(3, a, b, 2)
    assert cpu.unsupported(out, x, a, b) is None
    for reason, arguments in {
        r"^out is torch.float64; it takes torch.float32, torch.bfloat16, torch.float16$": (out.double(), x, a, b),
        r"^x is torch.int64; ": (out, x.long(), a, b),
        r"^the weights of A are torch.float64; ": (out, x, a._replace(dtype=torch.float64), b),
        r"^the mean of B is torch.bfloat16; it takes torch.float32$": (out, x, a, b._replace(mean=b.mean.bfloat16())),
        r"^the inv_sigma of A is torch.float64; ": (out, x, a._replace(inv_sigma=a.inv_sigma.double()), b),
        r"^it takes tensors on the CPU, not on meta$": (out, x.to("meta"), a, b),
        r"^it takes contiguous tensors$": (out, x, a, b._replace(inv_sigma=b.inv_sigma.T.contiguous().T)),
    }.items():
        assert re.search(reason, cpu.unsupported(*arguments) or "")
