"""Faults in the GPU kernels' sources, or in what the compilers make of them, are found by executing the PTX."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from ivon_kernels.backends import Backend, Draw
from tests.support.cuda_emulator import Side, both, grads_like, randn, shifted
from tests.support.cuda_emulator import train as train_both
from tests.support.lora_products import BF16, F32, Case, Problem, assert_accurate, of_dtypes
from tests.support.ptx import mutations
from tests.support.ptx.cuda import NVCC, PtxCudaBackend, ptx_cuda
from tests.support.ptx.mutations import CUDA, SPECIALIZED, TRITON, mutated, without_barrier
from tests.support.ptx.text import PtxError
from tests.support.ptx.triton import Device, PtxLora, ptx_triton
from tests.support.triton_tools import Spec, Twins, unaligned

pytestmark = pytest.mark.slow
DRAW = Draw(seed=7, sample=0, replica=1)
SEEDS = (None, 1, 2, 3)


def sample(backend: Backend) -> None:
    Twins([Spec((1000,)), Spec((2100,))], backend=backend).sample(DRAW)


def restore(backend: Backend) -> None:
    Twins([Spec((1030,)), Spec((7,))], backend=backend).restore()


def check(backend: Backend) -> None:
    """Of two gradients with inf the first is found."""
    twins = Twins([Spec((2000,)), Spec((40,)), Spec((1000,))], backend=backend)
    twins.new_grads()
    grads = [slot.grad for slot in twins.triton.slots]
    for grad in grads[1:]:
        assert grad is not None
        grad[-1] = torch.inf
    assert twins.triton.backend.find_nonfinite(twins.triton.list) == 1


def step(backend: Backend) -> None:
    twins = Twins([Spec((3000,), grad_place=unaligned), Spec((1500,)), Spec((8,))], backend=backend)
    for i in range(2):
        twins.new_grads(i)
        twins.step(DRAW)


OPERATIONS: dict[str, Callable[[Backend], None]] = {f.__name__: f for f in (sample, restore, check, step)}
SHOWN_BY = {
    "a mask left out": "sample",
    "the last tail forgotten": "sample",
    "a quotient that is not rounded": "sample",
    "a mask one too long": "restore",
    "the finding of any block, not the first": "check",
}
"""The operation that shows a fault, if it is not the step."""


def found(run: Callable[[int | None], None], seeds: Iterable[int | None] = SEEDS) -> bool:
    """Whether something is wrong with one of the seeds."""
    return any(_fails(run, seed) for seed in seeds)


def _fails(run: Callable[[int | None], None], seed: int | None) -> bool:
    try:
        run(seed)
    except (PtxError, AssertionError):
        return True
    return False


def on_triton(operation: str, device: Device) -> Callable[[int | None], None]:
    def run(seed: int | None) -> None:
        with ptx_triton(device._replace(seed=seed)) as backend:
            OPERATIONS[operation](backend)

    return run


@pytest.mark.parametrize("operation", OPERATIONS)
def test_without_a_fault_nothing_is_found(operation: str) -> None:
    assert not found(on_triton(operation, Device()), SEEDS[:2])


@pytest.mark.parametrize("name", TRITON)
def test_triton(name: str, tmp_path: Path) -> None:
    assert found(on_triton(SHOWN_BY.get(name, "step"), Device(root=mutated(tmp_path, TRITON[name]))))


@pytest.mark.parametrize("operation", ["sample", "step"])
def test_triton_contraction(operation: str) -> None:
    assert found(on_triton(operation, Device(fusion=True)))


@pytest.mark.parametrize(("operation", "number"), [("step", 2), ("check", 0)])
def test_triton_barrier(operation: str, number: int) -> None:
    """Of the step the one between the atomic operation and the threads that read what it gave; before it stand two in a
    row, the sources' and Triton's own, of which either is enough."""
    assert found(on_triton(operation, Device(edit=without_barrier(number))))


def _sizes(kernel: PtxLora, dtype: torch.dtype) -> None:
    for tokens in (64, 70):
        case = Case(samples=(1,), tokens=tokens, d_in=64, d_out=64, rank=16)
        assert_accurate(Problem(of_dtypes(dtype, dtype, dtype, dtype, case)), kernel)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_lora_specialized(dtype: torch.dtype, tmp_path: Path) -> None:
    """The fault that once was: 64 tokens, then 70 with the code that was made for 64."""
    root = mutated(tmp_path, SPECIALIZED)
    with pytest.raises((AssertionError, PtxError)):
        _sizes(PtxLora(Device(root=root, specialized=True)), dtype)


def test_lora_barriers() -> None:
    problem = Problem(of_dtypes(BF16, BF16, BF16, BF16, Case(samples=(1,), tokens=20, d_in=140, d_out=64, rank=16)))
    for number in range(3):
        kernel = PtxLora(Device(edit=without_barrier(number)))
        caught = _fails(lambda _, kernel=kernel: assert_accurate(problem, kernel), None)  # type: ignore[misc]
        if caught:
            return
    raise AssertionError("three barriers were removed, one after the other, and nothing was found")


# ---- CUDA C++ -------------------------------------------------------------------------------------------------------


def on_cuda(backend: PtxCudaBackend) -> Callable[[int | None], None]:
    def run(seed: int | None) -> None:
        backend._seed = seed
        weights = [randn(n) for n in (2500, 5, 64)]
        train_both(both(backend, weights), grads_like(weights))

    return run


needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc was found")


@needs_nvcc
def test_cuda_without_a_fault_nothing_is_found() -> None:
    assert not found(on_cuda(ptx_cuda()), SEEDS[:2])


@needs_nvcc
@pytest.mark.parametrize("number", [0, 2])
def test_cuda_barrier(number: int) -> None:
    """Without the second nothing is wrong: a block is counted before its last warp has ended, but what the last block
    writes was read by the thread that counts, and is for the next launch."""
    assert found(on_cuda(PtxCudaBackend(edit=without_barrier(number))))


@needs_nvcc
def test_cuda_contraction() -> None:
    assert found(on_cuda(PtxCudaBackend(contracted=True)), [None])


@needs_nvcc
@pytest.mark.parametrize("name", CUDA)
def test_cuda(name: str, tmp_path: Path) -> None:
    backend = PtxCudaBackend(source=mutated(tmp_path, CUDA[name]) / "csrc/cuda/launch.cu")
    weights = [shifted(randn(100), 1)]
    for side in (Side(ptx_cuda(), weights), Side(backend, weights)):
        side.set_grads([shifted(randn(100, seed=1), 1)])
        assert _fails(lambda _, side=side: side.backend.step(side.list, DRAW, False, False), None) == (  # type: ignore[misc]
            side.backend is backend
        )


def test_the_mutations_are_told() -> None:
    """docs/testing.md lists them."""
    text = " ".join((mutations.ROOT / "docs" / "testing.md").read_text().split())
    for name in (*TRITON, *CUDA):
        assert name in text
