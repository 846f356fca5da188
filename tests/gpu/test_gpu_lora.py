"""On a GPU: the Triton kernels of several LoRA samples, at sizes that the interpreter is too slow for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from ivon_kernels.backends.triton_launch import interpreted
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

pytestmark = [
    pytest.mark.gpu,
    # torch says so once, whenever the mode is set.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]
LARGE = Case(samples=range(10), tokens=70, d_in=1000, d_out=520, rank=16)
CASES = [
    *(replace(LARGE, rank=rank) for rank in (1, 8, 20, 64, 256)),
    replace(LARGE, samples=(3, 1, 4, 1, 5), d_in=999, d_out=521, shift=1),
    replace(LARGE, tokens=1),
    replace(LARGE, samples=(0,), tokens=300, d_in=4096),
    *(of_dtypes(dtype, dtype, dtype, dtype, LARGE) for dtype in (BF16, F16)),
    of_dtypes(BF16, BF16, BF16, BF16, replace(LARGE, rank=256)),
    of_dtypes(BF16, F32, F32, BF16, LARGE),
    of_dtypes(F16, F16, BF16, F32, LARGE),
]


@pytest.fixture(autouse=True)
def _on_a_gpu() -> Iterator[None]:
    if interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32


@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(case: Case) -> None:
    problem = Problem(case, "cuda")
    assert unsupported(problem.out, problem.x, problem.a, problem.b) is None
    assert_accurate(problem, lora_samples_)


@pytest.mark.parametrize(("x", "weights"), [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16)], ids=str)
@pytest.mark.parametrize(("d_in", "rank"), [(200, 8), (128, 64), (101, 5)])
def test_weights_have_the_bits_of_the_reference(x: torch.dtype, weights: torch.dtype, d_in: int, rank: int) -> None:
    case = of_dtypes(x, weights, weights, x, Case(samples=(65535, 0), d_in=d_in, d_out=72, rank=rank))
    assert_same_weights(case, lora_samples_, "cuda")


def test_the_host_never_waits() -> None:
    problem = Problem(LARGE, "cuda")
    arguments = (problem.x, problem.a, problem.b, 0.3, SEED)
    out = problem.out.clone()
    lora_samples_(out, *arguments, LARGE.samples)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        lora_samples_(out, *arguments, LARGE.samples)
        lora_samples_(out, *arguments, range(20, 30))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_call_replays() -> None:
    problem = Problem(LARGE, "cuda")
    expected = problem.run(lora_samples_)
    out, graph = problem.out.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lora_samples_(out, problem.x, problem.a, problem.b, 0.3, SEED, LARGE.samples)
    out.copy_(problem.out)
    graph.replay()
    assert torch.equal(out, expected)


def test_the_current_device_does_not_matter() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is only one GPU")
    problem = Problem(LARGE, "cuda:1")
    with torch.cuda.device(0):
        assert_accurate(problem, lora_samples_)
