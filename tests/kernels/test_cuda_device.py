"""What the CUDA backend decides on the device, how it launches, and what it refuses: on the emulator, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ivon_kernels.backends.base import Guard
from ivon_kernels.backends.cuda import CudaBackend
from ivon_kernels.backends.reference import ReferenceBackend
from ivon_kernels.backends.state import BAD, NOTHING_BAD, SKIPPED
from tests.support.cuda_emulator import (
    COMPILER,
    DRAW,
    DTYPES,
    F32,
    GROUPS,
    Side,
    assert_same,
    backend_on,
    both,
    device_of,
    emulator,
    grads_like,
    randn,
    train,
)
from tests.support.kernel_state import GROUP

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler was found, which makes the emulator")


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest) -> Iterator[CudaBackend]:
    backend = backend_on(request.param)
    yield backend
    backend.library.ivon_cuda_set_limits(0, 0, 0)
    backend.library.ivon_cuda_set_stub(0)


# ---- what the device decides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("approx", ["price", "gradsq"])
def test_gradients_that_carry_a_scale(cuda: CudaBackend, approx: str) -> None:
    weights = [randn(100), randn(9)]
    reference, device = both(cuda, weights, groups=[{**GROUP, "hess_approx": approx}])
    for scale in (65536.0, 3.0):
        reference.rows.update(reference.groups, scale)
        for side in (reference, device):
            side.set_grads([g * scale for g in grads_like(weights)])
        reference.backend.step(reference.list, DRAW, False, False)
        guard = Guard(torch.zeros(1, device=device.device), torch.tensor([scale], device=device.device))
        device.backend.step(device.list, DRAW, False, False, guard)
        assert_same(reference, device)


def test_learning_rate_on_the_device(cuda: CudaBackend) -> None:
    weights = [randn(100)]
    lr = torch.tensor(0.1, dtype=torch.float64, device=device_of(cuda))
    reference = Side(ReferenceBackend(), weights, groups=[GROUP])
    device = Side(cuda, weights, groups=[{**GROUP, "capturable": True, "lr": lr}])
    for value in (0.1, 0.03):
        reference.groups[0] = {**GROUP, "lr": value}
        reference.rows.update(reference.groups)
        lr.fill_(value)
        train((reference, device), grads_like(weights))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "at", [0, 2050, 8191, 8192, 8999]
)  # a chunk has 8192, looked at in another way when it is whole
def test_check_finds_the_first_bad_gradient(cuda: CudaBackend, dtype: torch.dtype, value: float, at: int) -> None:
    weights = [randn(10), randn(9000), randn(9000), randn(0)]
    _, device = both(cuda, weights, indices=[7, 9, 8, 3])
    grads: list[Tensor | None] = [None, *grads_like(weights[1:], dtype)]
    device.set_grads(grads)
    device.backend.check(device.list)
    assert int(device.flags.block[BAD]) == NOTHING_BAD
    for position in (1, 2):
        tensor = grads[position]
        assert tensor is not None
        tensor[at] = value
    device.set_grads(grads)
    assert device.backend.find_nonfinite(device.list) == 2
    assert int(device.flags.block[BAD]) == NOTHING_BAD
    device.backend.check(device.list)
    assert int(device.flags.block[BAD]) == 8


@pytest.mark.parametrize("why", ["check", "found_inf"])
@pytest.mark.parametrize("arenas", [1, 2])
@pytest.mark.parametrize(("adopt", "draw_next"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_skipped_step_leaves_the_state(
    cuda: CudaBackend, why: str, arenas: int, adopt: bool, draw_next: bool
) -> None:
    weights = [randn(2500), randn(6), randn(0), randn(3)]
    reference, device = both(cuda, weights, arenas=arenas)
    grads = grads_like(weights)
    grads[1][2] = float("nan")
    for side in (reference, device):
        side.backend.sample(side.list, DRAW, False)
        if adopt:
            side.backend.restore(side.list)
    if draw_next:
        reference.backend.sample(reference.list, DRAW._replace(sample=0), False)
    elif not adopt:
        reference.backend.restore(reference.list)
    else:
        for side in (reference, device):
            side.params[0][3] = 77.0  # stays in the weights, and out of the state
    guard = Guard(report=True)
    device.set_grads(grads)
    if why == "check":
        device.backend.check(device.list)
    else:
        one = torch.ones(1, device=device.device)
        guard = Guard(found_inf=one, grad_scale=one, report=False)
    device.backend.step(device.list, DRAW._replace(sample=4), adopt, draw_next, guard._replace(final=False))
    assert int(device.flags.block[SKIPPED]) == 0 and device.flags.new_report() is None
    device.backend.step(device.list, DRAW._replace(sample=4), adopt, draw_next, guard)
    assert int(device.flags.block[SKIPPED]) == (0 if why == "check" else 1)
    assert device.flags.new_report() == (1 if why == "check" else None)
    device.flags.block[SKIPPED] = 0
    assert_same(reference, device)


def test_reports_are_counted(cuda: CudaBackend) -> None:
    weights = [randn(5)]
    _, device = both(cuda, weights, indices=[41])
    for count in (1, 2):
        device.set_grads([torch.full((5,), float("inf"))])
        device.backend.check(device.list)
        device.backend.step(device.list, DRAW, False, False, Guard(report=True))
        assert device.slots[0].step == 2  # waits for the device
        assert device.flags.mailbox.tolist() == [count, 41]
    assert device.flags.new_report() == 41 and device.flags.new_report() is None
    device.set_grads([torch.ones(5)])
    device.backend.step(device.list, DRAW, False, False, Guard(report=True))
    assert device.slots[0].step == 3 and device.flags.new_report() is None


# ---- launches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [(3, 0, 0), (0, 1, 0), (0, 2, 3), (1, 1, 1), (0, 0, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"draw_next": True}], ids=str)
def test_many_launches_are_as_one(cuda: CudaBackend, limits: tuple[int, int, int], options: dict[str, bool]) -> None:
    weights = [randn(n) for n in (9000, 0, 1, 2048, 2049, 0, 13, 4096, 0)]
    sides = both(cuda, weights, groups=GROUPS)
    cuda.library.ivon_cuda_set_limits(*limits)
    before = cuda.library.ivon_cuda_launches()
    train(sides, grads_like(weights), **options)
    assert cuda.library.ivon_cuda_launches() - before > 4
    grads = grads_like(weights)
    grads[6][12] = float("nan")
    device = sides[1]
    device.set_grads(grads)
    device.backend.check(device.list)
    device.backend.step(device.list, DRAW, False, False, Guard(report=True))
    assert int(device.flags.block[BAD]) == NOTHING_BAD  # waits for the device
    assert device.flags.mailbox.tolist() == [1, 6]
    for side in sides:
        side.backend.restore(side.list)
    assert_same(*sides)


@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_threads_of_large_launches_do_more(cuda: CudaBackend, blocks: int) -> None:
    """From twice as many blocks as are many on, here lowered, a block's chunk is 4096 elements, and then 8192."""
    weights = [randn(n) for n in (40001, 5, 17000)]
    sides = both(cuda, weights, groups=GROUPS)
    cuda.library.ivon_cuda_set_limits(0, 0, blocks)
    before = cuda.library.ivon_cuda_launches()
    train(sides, grads_like(weights))
    chunk = {2: 8192, 4: 8192, 8: 4096}[blocks]
    chunks = sum(-(-w.numel() // chunk) for w in weights)
    assert cuda.library.ivon_cuda_launches() - before == 4 * -(-chunks // blocks)


@pytest.mark.parametrize(
    ("count", "launches"),
    [(1, 1), (50, 1), (51, 1), (161, 1), (456, 1), (457, 2), pytest.param(1100, 3, marks=pytest.mark.slow)],
)
def test_a_launch_holds_hundreds_of_tensors(cuda: CudaBackend, count: int, launches: int) -> None:
    weights = [randn(1 + i % 5) for i in range(count)]
    sides = both(cuda, weights)
    for side in sides:
        side.set_grads(grads_like(weights))
        before = cuda.library.ivon_cuda_launches()
        side.backend.step(side.list, DRAW, False, False)
    assert cuda.library.ivon_cuda_launches() - before == launches
    assert_same(*sides)


def test_many_groups(cuda: CudaBackend) -> None:
    weights = [randn(3) for _ in range(60)]
    train(both(cuda, weights, groups=[{**GROUP, "lr": 0.01 * i} for i in range(60)]), grads_like(weights))


def test_nothing_but_empty_tensors(cuda: CudaBackend) -> None:
    weights = [randn(0), randn(0)]
    train(both(cuda, weights), grads_like(weights))


def test_a_stub_launches_nothing(cuda: CudaBackend) -> None:
    weights = [randn(50)]
    reference, device = both(cuda, weights)
    cuda.library.ivon_cuda_set_stub(1)
    device.set_grads(grads_like(weights))
    device.backend.step(device.list, DRAW, False, False)
    assert_same(reference, device)


@pytest.mark.gpu
def test_captured_steps_replay() -> None:
    """Replays of one captured step are further steps: with their own noise, counts and bias correction."""
    cuda = backend_on("gpu")
    weights = [randn(300), randn(7)]
    lr = torch.tensor(0.1, dtype=torch.float64, device=device_of(cuda))
    reference = Side(ReferenceBackend(), weights)
    device = Side(cuda, weights, groups=[{**GROUP, "capturable": True, "lr": lr}])
    grads = grads_like(weights)
    for side in (reference, device):
        side.set_grads(grads)
        side.backend.step(side.list, DRAW, False, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.step(device.list, DRAW, False, True)
    for _ in range(3):
        graph.replay()
        reference.backend.step(reference.list, DRAW, False, True)
        torch.cuda.synchronize()
        assert_same(reference, device)


# ---- what it refuses ------------------------------------------------------------------------------------------------


def test_reasons(tmp_path: Path) -> None:
    cuda = emulator()
    assert cuda.unsupported(torch.device("cpu"), F32) is None
    assert "not on cuda" in str(cuda.unsupported(torch.device("cuda:0"), F32))
    assert "float64" in str(cuda.unsupported(torch.device("cpu"), torch.float64))
    path = tmp_path / "libnothing.so"
    assert "libnothing" in str(CudaBackend(str(path)).unavailable())
    with pytest.raises(RuntimeError, match=r"the cuda backend is missing: .*libnothing"):
        CudaBackend(str(path)).restore(Side(cuda, [randn(3)]).list)


def test_errors_name_operation_device_and_cause() -> None:
    cuda = emulator()
    device = Side(cuda, [randn(3)])
    cuda.restore(device.list)
    fake = CudaBackend(cuda._path)
    fake._functions = {"restore": lambda _: 9}
    with pytest.raises(RuntimeError, match=r"failed at restore on cpu: an error of the emulator \(error 9\)"):
        fake.restore(device.list)
