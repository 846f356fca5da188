"""The Triton kernels of several LoRA samples under the interpreter: the weights' bits, errors, shapes, dtypes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("numpy")

from ivon_kernels.backends.triton_launch import interpreted
from ivon_kernels.lora import triton
from ivon_kernels.lora.triton import lora_samples_, unsupported
from tests.support.lora_products import (
    BF16,
    F16,
    F32,
    SEED,
    Case,
    Problem,
    assert_accurate,
    assert_same_weights,
    of_dtypes,
)

pytestmark = pytest.mark.skipif(not interpreted(), reason="TRITON_INTERPRET is off: test_gpu_lora.py is for GPUs")

SHAPES = [
    Case(),
    Case(samples=(0,), tokens=17, d_in=8, d_out=16, rank=1),
    Case(samples=(9, 2, 131071), tokens=1, d_in=33, d_out=17, rank=3),
    Case(samples=(4,), tokens=3, d_in=1, d_out=1, rank=40),
    Case(samples=(6, 1), tokens=2, d_in=70, d_out=18, rank=20),
    Case(d_in=36, d_out=20, rank=12, shift=1),
]
DTYPES = [
    of_dtypes(BF16, BF16, BF16, BF16),
    of_dtypes(F16, F16, F16, F16),
    of_dtypes(BF16, F32, F32, BF16),
    of_dtypes(F16, F16, BF16, F32),
    of_dtypes(F32, BF16, BF16, F16),
    of_dtypes(BF16, BF16, F32, F32, Case(rank=5, shift=1)),
    of_dtypes(BF16, BF16, BF16, BF16, Case(rank=6, d_in=44, d_out=20)),
]


@pytest.mark.parametrize("case", [*SHAPES, *DTYPES], ids=str)
def test_accuracy(case: Case) -> None:
    assert_accurate(Problem(case), lora_samples_)


@pytest.mark.parametrize(("x", "weights"), [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16)], ids=str)
@pytest.mark.parametrize(("d_in", "rank"), [pytest.param(16, 8, marks=pytest.mark.slow), (21, 5)])
def test_weights_have_the_bits_of_the_reference(x: torch.dtype, weights: torch.dtype, d_in: int, rank: int) -> None:
    case = of_dtypes(x, weights, weights, x, Case(samples=(131071, 0), d_in=d_in, d_out=24, rank=rank))
    assert_same_weights(case, lora_samples_)


@pytest.mark.parametrize("programs", [1, 6])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_columns_split_among_programs(programs: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tiles of columns: all to one program, or 2, 2 and 1 to three."""
    monkeypatch.setattr(triton, "_PROGRAMS", programs)
    assert_accurate(Problem(of_dtypes(dtype, dtype, dtype, dtype, Case(d_in=5 * 32 - 8))), lora_samples_)


def test_scaling_and_seed_matter() -> None:
    problem = Problem(Case(samples=(1,)))
    first = problem.run(lora_samples_)
    assert torch.equal(first, problem.run(lora_samples_))
    assert not torch.equal(first, problem.run(lora_samples_, scaling=0.3000001))
    problem.a = problem.a._replace(index=3)
    assert not torch.equal(first, problem.run(lora_samples_))


@pytest.mark.parametrize(
    ("samples", "runs"),
    [
        ([], []),
        ([7], [(0, [7])]),
        (range(2, 6), [(0, [2, 3, 4, 5])]),
        ([5, 5, 5], [(0, [5, 5, 5])]),
        ([9, 6, 3, 4], [(0, [9, 6, 3]), (3, [4])]),
        ([0, 1, 5, 7, 9, 2], [(0, [0, 1]), (2, [5, 7, 9]), (5, [2])]),
    ],
)
def test_evenly_spaced_runs(samples: list[int], runs: list[tuple[int, list[int]]]) -> None:
    assert [(begin, list(numbers)) for begin, numbers in triton._evenly_spaced(samples)] == runs


def test_each_sample_has_its_own_rows() -> None:
    """Samples in any order, in one call, give the bits that each gives alone."""
    numbers = (4, 7, 2, 2)
    problem = Problem(Case(samples=numbers, tokens=2, d_in=16, d_out=16))
    together = problem.run(lora_samples_).split(2)
    for sample, x, out, result in zip(numbers, problem.x.split(2), problem.out.split(2), together, strict=True):
        alone = out.clone()
        lora_samples_(alone, x, problem.a, problem.b, 0.3, SEED, (sample,))
        assert torch.equal(alone, result)


@pytest.mark.parametrize("rank", [5, 20])
def test_padding_hides_nothing_and_adds_nothing(rank: int) -> None:
    """Where a token is inf, so is its result; other tokens do not notice."""
    problem = Problem(Case(samples=(1,), rank=rank))
    problem.x[2] = float("inf")
    ours, theirs = problem.run(lora_samples_), problem.reference()
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert ours[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("sizes", [{"tokens": 0}, {"d_in": 0}, {"d_out": 0}, {"rank": 0}], ids=str)
def test_nothing_to_do(sizes: dict[str, int]) -> None:
    problem = Problem(Case(**sizes))
    assert torch.equal(problem.run(lora_samples_), problem.out)


def test_no_number_compiles_anything_again() -> None:
    """Arguments are int64, which Triton specializes nothing on, or choices from short lists."""
    from ivon_kernels.lora import triton_kernels

    for kernel in (triton_kernels.down_kernel, triton_kernels.up_kernel):
        annotations = kernel.fn.__annotations__
        assert set(annotations) == set(kernel.arg_names)
        assert set(annotations.values()) == {"tl.int64", "tl.constexpr"}
    tiles = {triton._tiles(tokens, rank, F32) for tokens in range(1, 300) for rank in range(1, 300)}
    assert len(tiles) <= 6


def test_what_counts_as_aligned() -> None:
    """The interpreter would not notice; on a GPU it is an error."""
    aligned, shifted = (Problem(Case(shift=shift)).placed(torch.ones(4, 4)) for shift in (0, 1))
    assert triton._aligned(4, aligned) and not triton._aligned(4, aligned, shifted)
    assert not triton._aligned(6, aligned)
    assert triton._aligned(8, aligned.to(BF16)) and not triton._aligned(4, aligned.to(BF16))


def test_refusals() -> None:
    problem = Problem(Case())
    out, x, a, b = problem.out, problem.x, problem.a, problem.b
    assert unsupported(out, x, a, b) is None
    assert "float64" in str(unsupported(out, x.double(), a, b))
    assert "float64" in str(unsupported(out.double(), x, a, b))
    assert "int32" in str(unsupported(out, x, a, b._replace(dtype=torch.int32)))
    assert "meta" in str(unsupported(out, x.to("meta"), a, b))
    assert str(2**25) in str(unsupported(out, torch.zeros(1).expand(1, 2**25), a, b))
