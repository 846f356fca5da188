"""The CUDA backend against the reference, bit for bit, without a GPU: a C++ compiler makes the emulator of csrc/cuda.

The emulator is the same source file: the same packed arguments and chunks, with loops in place of blocks and threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ivon_kernels import noise
from ivon_kernels.backends.cuda import CudaBackend
from tests.support.cuda_emulator import (
    COMPILER,
    DRAW,
    DTYPES,
    F32,
    GROUPS,
    assert_same,
    backend_on,
    both,
    device_of,
    grads_like,
    laid_out,
    randn,
    train,
)
from tests.support.helpers import slow_but

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler was found, which makes the emulator")
SIZES = (0, 1, 3, 4, 5, 1023, 1024, 1025, 2047, 2048, 2049, 5000)


@pytest.fixture(params=["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest) -> Iterator[CudaBackend]:
    backend = backend_on(request.param)
    yield backend
    backend.library.ivon_cuda_set_limits(0, 0, 0)
    backend.library.ivon_cuda_set_stub(0)


# ---- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 2, 3, 1023, 2**32 - 500, 2**34 - 501, 2**42 - 700])
@pytest.mark.parametrize(("seed", "step", "param"), [(0, 0, 0), (2**64 - 3, 17, 2**24 - 1), (5, 2**32 - 1, 77)])
def test_noise_has_the_bits_of_the_specification(
    cuda: CudaBackend, start: int, seed: int, step: int, param: int
) -> None:
    for numel in (0, 1, 3, 5, 700):
        out = torch.full((numel,), float("nan"), device=device_of(cuda))
        sample = 5 + noise.MIRROR * (numel % 2)
        code = cuda.library.ivon_cuda_normals(out.data_ptr(), numel, seed, step, sample, 3, param, start, 0, None)
        expected = noise.normals(numel, seed=seed, step=step, sample=sample, replica=3, param=param, start=start)
        assert code == 0 and torch.equal(out.cpu().view(torch.int32), expected.view(torch.int32))


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("adopt", "draw_next"), [(False, False), (True, False), (False, True), (True, True)])
def test_sizes(cuda: CudaBackend, adopt: bool, draw_next: bool) -> None:
    weights = [randn(n) for n in reversed(SIZES)]
    sides = both(cuda, weights, indices=[2**24 - 1 - i for i in range(len(weights))])
    for i in range(2):
        train(sides, grads_like(weights, seed=i), adopt=adopt, draw_next=draw_next)


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "layout",
    slow_but(
        ["plain", "unaligned", "aligned to 8 bytes", "transposed", "channels_last", "every other"],
        *("plain", "unaligned", "transposed"),
    ),
)
def test_dtypes_and_layouts(cuda: CudaBackend, param_dtype: torch.dtype, grad_dtype: torch.dtype, layout: str) -> None:
    shapes = ((2, 3, 5, 7), (1, 4, 1, 3), (2, 0, 1, 1), (5, 16, 8, 8))
    weights = [laid_out(randn(*shape, dtype=param_dtype), layout) for shape in shapes]
    other = {"plain": "unaligned", "unaligned": "plain", "channels_last": "plain"}.get(layout, layout)
    grads = [laid_out(g, other) for g in grads_like(weights, grad_dtype)]
    for options in ({}, {"draw_next": True}):
        sides = both(cuda, weights)
        train(sides, grads, **options)
        train(sides, grads, **options)


def test_strides_that_change_between_steps(cuda: CudaBackend) -> None:
    weights = [randn(6, 7), randn(30, 11)]
    sides = both(cuda, weights)
    for i, layout in enumerate(("plain", "transposed", "every other", "transposed", "plain")):
        train(sides, [laid_out(g, layout) for g in grads_like(weights, seed=i)])
    assert len(sides[1].list.cache.rows_on_device) == 4  # each layout was brought to the device once


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edits_are_adopted(cuda: CudaBackend, dtype: torch.dtype) -> None:
    weights = [randn(n, dtype=dtype) for n in (5, 3000)]
    sides = both(cuda, weights)
    for side in sides:
        for slot in side.slots:
            noise = randn(*slot.mean.shape, seed=4).to(slot.mean.device)
            slot.mean.add_(1e-4 * noise)  # what 16 bits do not hold must survive
        side.backend.restore(side.list)
        side.params[0][2:] *= 2
        side.params[1][::7] = -0.0
        side.backend.sample(side.list, DRAW, True)
    assert_same(*sides)


@pytest.mark.parametrize("approx", ["price", "gradsq"])
@pytest.mark.parametrize("arenas", [1, 2])
def test_groups_and_sums_of_samples(cuda: CudaBackend, approx: str, arenas: int) -> None:
    weights = [randn(n, dtype=dtype) for n, dtype in zip((2049, 7, 0, 300, 1, 64), DTYPES * 2, strict=True)]
    sides = both(cuda, weights, groups=[{**g, "hess_approx": approx} for g in GROUPS], arenas=arenas)
    for side in sides:
        side.rows.update(side.groups, 1.0, 3)
    grads: list[list[Tensor | None]] = [[*grads_like(weights, F32, seed=i)] for i in range(3)]
    grads[1][0] = grads[2][4] = None
    for sample in range(2):
        for side in sides:
            side.set_summed([True] * 6)
            side.set_grads(grads[sample])
            side.backend.accumulate(side.list, DRAW._replace(sample=sample))
        assert_same(*sides)
    for summed in ([True] * 6, [True, False] * 3, [False] * 6):
        for side in sides:
            side.set_summed(summed)
            side.set_grads(grads[2])
            side.backend.step(side.list, DRAW._replace(sample=2), False, False)
        assert_same(*sides)


def test_the_step_may_be_given(cuda: CudaBackend) -> None:
    weights = [randn(100)]
    train(both(cuda, weights), grads_like(weights), draw=DRAW._replace(step=noise.EVAL_STEP, sample=2**17 - 1))


@pytest.mark.parametrize("steps", [0, 1, 159, 170, 10**6, 2**32 - 3])
def test_bias_correction_at_any_step(cuda: CudaBackend, steps: int) -> None:
    weights = [randn(40), randn(40), randn(40)]
    train(both(cuda, weights, steps=steps, groups=GROUPS), grads_like(weights))


@pytest.mark.parametrize("current", [1, 0])
def test_a_launch_switches_torch_to_its_device_and_back(monkeypatch: pytest.MonkeyPatch, current: int) -> None:
    """torch goes back to the device before without giving it a context; the library does not go back at all."""
    backend = backend_on("emulator")
    _, side = both(backend, [randn(40)])
    side.backend.sample(side.list, DRAW, True)
    side.list.cache.index = 1  # as of parameters on a second GPU
    now, seen = [current], []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        before, now[0] = now[0], index
        yield
        now[0] = before

    def stream(index: int) -> int:
        seen.append((index, now[0]))
        return 0

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: now[0], raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", stream, raising=False)
    monkeypatch.setattr(torch.cuda, "device", device)
    side.backend.restore(side.list)
    assert seen == [(1, 1)] and now == [current]
