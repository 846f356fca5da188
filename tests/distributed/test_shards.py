"""A shard's elements have the noise of their indices in the unsharded tensor, on every backend, in every operation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ivon_kernels import available_backends, noise
from ivon_kernels.backends import cpu
from ivon_kernels.backends.base import Draw
from ivon_kernels.backends.cpu import CpuBackend
from ivon_kernels.backends.cuda import CudaBackend
from ivon_kernels.backends.reference import ReferenceBackend
from ivon_kernels.backends.triton import TritonBackend
from ivon_kernels.backends.triton_launch import interpreted
from ivon_kernels.noise import Shard
from tests.support.cuda_emulator import (
    BF16,
    COMPILER,
    DRAW,
    F16,
    F32,
    Side,
    assert_same,
    emulator,
    grads_like,
    laid_out,
    randn,
)
from tests.support.kernel_state import GROUP

HERE = available_backends()
NEEDS_COMPILER = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler was found, which makes the emulator")
BACKENDS: dict[str, tuple[Any, Any]] = {
    "reference": (ReferenceBackend, ()),
    "cpu": (CpuBackend, pytest.mark.skipif(HERE["cpu"] is not None, reason=f"cpu: {HERE['cpu']}")),
    "cuda": (emulator, NEEDS_COMPILER),
    "triton": (TritonBackend, pytest.mark.skipif(HERE["triton"] is not None, reason=f"triton: {HERE['triton']}")),
    "cuda on a GPU": (
        CudaBackend,
        [pytest.mark.gpu, pytest.mark.skipif(HERE["cuda"] is not None, reason=f"cuda: {HERE['cuda']}")],
    ),
    "triton on a GPU": (
        TritonBackend,
        [
            pytest.mark.gpu,
            pytest.mark.skipif(interpreted() or HERE["triton"] is not None, reason="no GPU, or TRITON_INTERPRET=1"),
        ],
    ),
}
EVERY = [pytest.param(make, marks=marks, id=name) for name, (make, marks) in BACKENDS.items()]
STREAM: dict[str, Any] = {"seed": DRAW.seed, "sample": DRAW.sample, "replica": DRAW.replica}
PLAIN = {**GROUP, "ess": 1.0, "weight_decay": 0.0}  # with hess 1 the weights are mean + eps


def put(side: Side, shards: Sequence[Shard | None]) -> Side:
    """Make the parameters shards, and give the backend room to keep their noise if it does that."""
    for slot, shard in zip(side.slots, shards, strict=True):
        slot.shard = shard
        if side.backend.keeps_noise:
            slot.arena.noise = torch.full_like(slot.arena.mean, float("nan"))
    return side


def drawn(
    backend: Any, shapes: Sequence[Sequence[int]], shards: Sequence[Shard | None], draw: Draw = DRAW
) -> list[Tensor]:
    """The noise of step 2, 3, 4, 2, ... for parameters 0, 1, 2, ..., as the weights show it."""
    side = put(Side(backend, [torch.zeros(*shape) for shape in shapes], groups=[PLAIN]), shards)
    for slot in side.slots:
        slot.hess.fill_(1.0)
    backend.sample(side.list, draw, False)
    return [param.cpu() for param in side.params]


def by_definition(number: int, numel: int, shard: Shard, draw: Draw) -> Tensor:
    """The same from the specification, element by element."""
    start, run, pitch = shard
    stream = {**STREAM, "sample": draw.sample, "step": 2 + number % 3, "param": number}
    normals = [noise.normals(1, start=start + i // run * pitch + i % run, **stream) for i in range(numel)]
    return torch.cat([torch.empty(0), *normals])


def split(shape: Sequence[int], dim: int, world: int) -> list[tuple[Shard, slice]]:
    """How ``Shard(dim)`` of DTensor splits: torch.chunk's slices of the dimension, an empty one where it gives less."""
    inner, size = math.prod(shape[dim + 1 :]), -(-shape[dim] // world)
    slices = [slice(min(r * size, shape[dim]), min((r + 1) * size, shape[dim])) for r in range(world)]
    return [(Shard(s.start * inner, max(1, (s.stop - s.start) * inner), shape[dim] * inner), s) for s in slices]


# ---- noise ----------------------------------------------------------------------------------------------------------

SPLITS = {  # shape, dimension, ranks
    "rows, aligned": ((8, 12), 0, 2),
    "rows, not aligned": ((6, 5), 0, 3),
    "rows, an empty rank": ((5, 6), 0, 4),
    "columns, aligned": ((6, 16), 1, 4),
    "columns, not aligned": ((5, 9), 1, 3),
    "columns, runs aligned and pitch not": ((4, 10), 1, 3),
    "the middle of three": ((3, 4, 6), 1, 2),
    "a vector": ((11,), 0, 3),
    "columns, several chunks": ((80, 32), 1, 2),
}


@pytest.mark.parametrize("make", EVERY)
def test_slices_of_the_whole_tensor(make: Any) -> None:
    """All ranks of all splits in one list, with a whole tensor among them."""
    parts = [(shape, dim, *part) for shape, dim, world in SPLITS.values() for part in split(shape, dim, world)]
    shapes = [(*shape[:dim], s.stop - s.start, *shape[dim + 1 :]) for shape, dim, _, s in parts]
    params = drawn(make(), [*shapes, (7, 3)], [*(shard for _, _, shard, _ in parts), None])
    for number, (shape, dim, _, s) in enumerate(parts):
        whole = noise.normals(math.prod(shape), step=2 + number % 3, param=number, **STREAM).view(shape)
        assert torch.equal(params[number], whole.movedim(dim, 0)[s].movedim(0, dim)), (number, shape, s)
    number = len(parts)
    whole = noise.normals(21, step=2 + number % 3, param=number, **STREAM)
    assert torch.equal(params[number].flatten(), whole)


FAR = [
    (Shard(2**32 - 8, 4, 2**31), 24),
    (Shard(2**34 - 8, 16, 16), 21),  # Philox blocks across 2^32
    (Shard(2**34 - 8, 8, 20), 24),
    (Shard(2**34 - 7, 5, 5 * 2**30 + 3), 12),
    (Shard(2**42 - 30, 10, 20), 20),
    (Shard(2**35 + 2, 4, 8), 9),
    (Shard(2**35, 1, 1), 6),
    (Shard(2**40, 2**33, 2**34), 140),
    (Shard(5, 3, 7), 20),
    (Shard(1, 1, 9), 10),
]


@pytest.mark.parametrize("make", EVERY)
def test_far_and_odd(make: Any) -> None:
    draw = DRAW._replace(sample=DRAW.sample + noise.MIRROR)
    params = drawn(make(), [(numel,) for _, numel in FAR], [shard for shard, _ in FAR], draw)
    for number, (shard, numel) in enumerate(FAR):
        assert torch.equal(params[number], by_definition(number, numel, shard, draw)), shard


@pytest.fixture(params=cpu.simd_levels() if HERE["cpu"] is None else [])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.simd_level()
    cpu.set_simd_level(request.param)
    yield request.param
    cpu.set_simd_level(before)


@pytest.mark.parametrize("threads", [1, 2])
def test_simd_levels_and_threads(level: str, threads: int) -> None:
    torch.set_num_threads(threads)
    shards = [Shard(4, 4, 8), Shard(2**34 - 400, 12, 28), Shard(8, 1028, 2048), Shard(3, 77, 101), Shard(6, 4, 6)]
    shards += [Shard(2**34 - 3001, 9000, 9000), Shard(3, 1100, 1101), Shard(2**34 - 1200, 1024, 1028)]
    sizes = [2 * 1024 + 4 * number for number in range(len(shards))]
    shapes = [(size,) for size in sizes]
    for ours, theirs in zip(
        drawn(CpuBackend(), shapes, shards), drawn(ReferenceBackend(), shapes, shards), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_any_elements_of_a_stream() -> None:
    stream: dict[str, Any] = {"seed": 3, "step": 5, "sample": 1, "replica": 2, "param": 7}
    whole = noise.normals(100, start=2**34 - 50, **stream)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise.normals_at(2**34 - 50 + order, **stream), whole[order])
    assert noise.normals_at(torch.empty(0, dtype=torch.int64), **stream).shape == (0,)
    for elements in ([-1, 4], [2**42]):
        with pytest.raises(ValueError, match="outside"):
            noise.normals_at(torch.tensor(elements), **stream)
    with pytest.raises(ValueError, match="param"):
        noise.normals_at(torch.tensor([0]), seed=0, step=0, param=2**24)


# ---- operations -----------------------------------------------------------------------------------------------------

# Local shapes with a place for each: aligned and not, in one run and in many.
LOCAL = [((12, 4), Shard(48, 48, 48)), ((3, 7), Shard(9, 21, 21)), ((6, 8), Shard(16, 8, 32)), ((5, 3), Shard(5, 3, 7))]
LOCAL += [((0, 4), Shard(12, 4, 4)), ((2, 3), None)]
CASES = {  # dtype, layout, further settings of the group, MC samples, adopt and draw_next of the step
    "float32": (F32, "plain", {}, 1, (False, False)),
    "float32, next drawn": (F32, "plain", {}, 1, (False, True)),
    "float32, several samples": (F32, "every other", {}, 3, (False, True)),
    "bfloat16, gradsq": (BF16, "transposed", {"hess_approx": "gradsq"}, 2, (False, False)),
    "bfloat16, edits": (BF16, "plain", {}, 2, (True, False)),
    "float16, next drawn": (F16, "transposed", {}, 1, (False, True)),
    "float16, unaligned": (F16, "unaligned", {"debias": False}, 1, (False, False)),
}
INTERPRETED = ("float32, next drawn", "float32, several samples", "float16, next drawn")  # slowly
UPDATES = [
    pytest.param(make, case, marks=marks, id=f"{name}-{case}")
    for name, (make, marks) in BACKENDS.items()
    for case in (INTERPRETED if name.startswith("triton") else CASES if name != "reference" else ())
]


def step_of(side: Side, case: str, grads: Sequence[Tensor], step: int) -> None:
    """One step of training, each sample with gradients of its own."""
    _, layout, _, samples, (adopt, draw_next) = CASES[case]
    side.rows.update(side.groups, 1.0, samples)
    side.slots[0].arena.clear_sums()
    side.set_summed([samples > 1] * len(side.slots))
    for sample in range(samples):
        draw = DRAW._replace(sample=sample)
        side.backend.sample(side.list, draw, sample == 0 and step == 0)
        side.set_grads([laid_out(grad * (1 + step + sample), layout) for grad in grads])
        if sample < samples - 1:
            side.backend.accumulate(side.list, draw)
    if adopt:
        side.backend.restore(side.list)
        side.params[0][::2] += 1.0
    side.backend.step(side.list, draw, adopt, draw_next)


@pytest.mark.parametrize(("make", "case"), UPDATES)
def test_whole_updates(make: Any, case: str) -> None:
    dtype, layout, settings, *_ = CASES[case]
    weights = [laid_out(randn(*shape, dtype=dtype), layout) for shape, _ in LOCAL]
    shards = [shard for _, shard in LOCAL]
    sides = [put(Side(b, weights, groups=[{**GROUP, **settings}]), shards) for b in (ReferenceBackend(), make())]
    for step in range(1 if make is TritonBackend else 3):
        for side in sides:
            step_of(side, case, grads_like(weights), step)
        assert_same(*sides)
    for side in sides:  # an evaluation's sample
        side.backend.sample(side.list, DRAW._replace(step=noise.EVAL_STEP, sample=3), False)
    assert_same(*sides)


@st.composite
def placements(draw: st.DrawFn) -> tuple[int, Shard]:
    run = draw(st.one_of(st.integers(1, 40), st.integers(1, 12).map(lambda n: 4 * n), st.just(1500)))
    pitch = run + draw(st.one_of(st.sampled_from([0, 4, 2**33]), st.integers(0, 9)))
    start = draw(st.one_of(st.integers(0, 50), st.integers(-60, 60).map(lambda n: 2**34 + 4 * n)))
    return draw(st.one_of(st.integers(0, 200), st.integers(2030, 2060))), Shard(start, run, pitch)


@pytest.mark.parametrize("make", [EVERY[1], EVERY[2]])
@given(parts=st.lists(placements(), min_size=1, max_size=4))
def test_any_placement(make: Any, parts: list[tuple[int, Shard]]) -> None:
    weights = [randn(numel) for numel, _ in parts]
    shards = [shard for _, shard in parts]
    sides = [put(Side(backend, weights), shards) for backend in (ReferenceBackend(), make())]
    for side in sides:
        side.backend.sample(side.list, DRAW, True)
        side.set_grads(grads_like(weights))
        side.backend.step(side.list, DRAW, False, True)
    assert_same(*sides)


# ---- what is launched -----------------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> Iterator[CudaBackend]:
    if COMPILER is None:
        pytest.skip("no C++ compiler was found, which makes the emulator")
    backend = emulator()
    yield backend
    backend.library.ivon_cuda_set_limits(0, 0, 0)


def test_aligned_shards_share_the_launch_of_whole_tensors(cuda: CudaBackend) -> None:
    shards = [None, Shard(8, 24, 24), Shard(400, 24, 4000), None]
    weights = [randn(24) for _ in shards]
    side = put(Side(cuda, weights), shards)
    before = cuda.library.ivon_cuda_launches()
    cuda.sample(side.list, DRAW, True)
    assert cuda.library.ivon_cuda_launches() == before + 1


@pytest.mark.parametrize("limits", [(0, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize("whole", [0, 1, 60])
def test_many_gathered_shards(cuda: CudaBackend, whole: int, limits: tuple[int, int, int]) -> None:
    """More than one launch holds; every tensor is updated and counted once."""
    shards = [Shard(5 * n, 3, 7) for n in range(43)] + [None] * whole
    weights = [randn(9 if shard else 2051) for shard in shards]
    sides = [put(Side(backend, weights, arenas=2), shards) for backend in (ReferenceBackend(), cuda)]
    cuda.library.ivon_cuda_set_limits(*limits)
    for side in sides:
        side.backend.sample(side.list, DRAW, True)
        side.set_grads([*grads_like(weights[:-1]), None])
        side.backend.step(side.list, DRAW, False, False)
    assert_same(*sides)


@pytest.mark.parametrize("shard", [Shard(2, 3, 7), None])
def test_a_skipped_step_skips_both_kinds(cuda: CudaBackend, shard: Shard | None) -> None:
    """A gradient of one kind that is not finite leaves tensors of the other kind as they are."""
    shards = [shard, None, Shard(1, 12, 12)]
    weights = [randn(12) for _ in shards]
    side = put(Side(cuda, weights), shards)
    cuda.sample(side.list, DRAW, True)
    cuda.restore(side.list)
    before = [tensor.clone() for tensor in side.everything()]
    cuda.sample(side.list, DRAW, True)
    grads = grads_like(weights)
    grads[0][5] = float("inf")
    side.set_grads(grads)
    cuda.check(side.list)
    cuda.step(side.list, DRAW, False, False)
    for old, new in zip(before, side.everything(), strict=True):
        assert torch.equal(old, new)
    assert side.flags.skipped() == 1 and side.flags.found() == 2**62


@pytest.mark.parametrize(
    ("shape", "shard", "expected"),
    [
        ((6,), None, Shard(0, 8, 8)),
        ((0,), Shard(7, 1, 1), Shard(7, 4, 4)),
        ((2, 3), Shard(3, 6, 6), Shard(3, 8, 8)),
        ((2, 3), Shard(3, 9, 90), Shard(3, 8, 8)),
        ((2, 3), Shard(3, 3, 3), Shard(3, 8, 8)),
        ((2, 3), Shard(3, 3, 5), Shard(3, 3, 5)),
    ],
)
def test_placement_has_as_few_runs_as_there_are(shape: tuple[int, ...], shard: Shard | None, expected: Shard) -> None:
    side = put(Side(ReferenceBackend(), [torch.zeros(shape)]), [shard])
    assert side.slots[0].placement == expected
