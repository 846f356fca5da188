"""The Triton kernels under the interpreter give the reference's bits: noise, update, dtypes, layouts, skipped steps."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("numpy")

from ivon_kernels import noise
from ivon_kernels.backends import Draw, Guard
from ivon_kernels.backends.triton import TritonBackend
from ivon_kernels.backends.triton_launch import Kernel
from tests.support.helpers import slow_but
from tests.support.kernel_state import GROUP
from tests.support.triton_tools import (
    STATE,
    Place,
    Spec,
    Twins,
    contiguous,
    gapped,
    transposed,
    unaligned,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DRAW = Draw(seed=2**64 - 5, sample=0)


@pytest.mark.parametrize(
    "draw",
    [
        Draw(0, 0),
        Draw(1, 0),
        Draw(2**31, 1, 3),
        Draw(2**32 + 16, 2**17 - 1, 2**16 - 1),
        Draw(2**63, 7, 0, step=2**31),
        Draw(2**64 - 1, 0, 1, step=noise.EVAL_STEP),
        Draw(2**40, 0, 0, step=0),
    ],
)
def test_noise(draw: Draw) -> None:
    twins = Twins([Spec((260,)), Spec((129,), index=2**24 - 1), Spec((2, 3), index=1)])
    twins.sample(draw)


@pytest.mark.parametrize("begin", [2**32 - 512, 2**34 - 512, 2**34, 2**42 - 512])
def test_noise_far_from_the_beginning(begin: int) -> None:
    """No tensor of that size is needed: the noise function is run by itself."""
    from tests.support.triton_probes import normals_kernel

    out = torch.empty(512)
    args = (out.data_ptr(), begin, 5, 77, 9, 3)
    Kernel(normals_kernel, torch.device("cpu"), (512,)).launch(1, args)
    assert torch.equal(out, noise.normals(512, seed=5, step=9, sample=3, param=77, start=begin))


@pytest.mark.parametrize("numel", [0, 1, 3, 4, 127, 128, 129, 132, 500])
def test_sizes(numel: int) -> None:
    twins = Twins([Spec((numel,)), Spec((8,))])
    twins.sample(DRAW)
    twins.new_grads()
    twins.step(DRAW)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("draw_next", slow_but([False, True], True))
def test_dtypes(dtype: torch.dtype, grad_dtype: torch.dtype, draw_next: bool) -> None:
    twins = Twins([Spec((132,), dtype, grad_dtype), Spec((5,), dtype, grad_dtype)])
    twins.sample(DRAW)
    for step in range(2):
        twins.new_grads(step)
        twins.step(DRAW, draw_next=draw_next)
    twins.restore()


PLACES: dict[str, tuple[Place, Place]] = {
    "unaligned": (unaligned, unaligned),
    "unaligned gradient": (contiguous, unaligned),
    "transposed": (transposed, transposed),
    "transposed gradient": (contiguous, transposed),
    "gapped": (gapped, contiguous),
    "all different": (transposed, gapped),
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("dtype", slow_but([torch.float32, torch.bfloat16], torch.bfloat16))
def test_layouts(places: tuple[Place, Place], dtype: torch.dtype) -> None:
    specs = [Spec(shape, dtype, place=places[0], grad_place=places[1]) for shape in ((6, 8, 4), (3, 5, 7))]
    twins = Twins(specs)
    twins.sample(DRAW, adopt=True)
    twins.new_grads()
    twins.step(DRAW)
    twins.edit()
    twins.step(DRAW, adopt=True)


def test_many_at_once() -> None:
    """Several arenas, groups, dtypes and layouts in one list; gradients that are None; every hyperparameter moving."""
    groups = [
        {**GROUP},
        {**GROUP, "hess_approx": "gradsq", "debias": False, "rescale_lr": False, "clip_radius": 0.5},
        {**GROUP, "beta1": 0.0, "weight_decay": 0.0, "ess": 1e6},
    ]
    specs = [
        Spec((140,)),
        Spec((9,), torch.bfloat16, group=1),
        Spec((4, 5), torch.float16, place=transposed, group=2),
        Spec((0,)),
        Spec((64,), grad_place=None, group=1),
        Spec((12,), torch.bfloat16, torch.float32, group=2),
        Spec((260,), group=1),
    ]
    twins = Twins(specs, groups, arenas=2)
    for step in range(3):
        twins.sample(DRAW, adopt=True)
        twins.new_grads(step, scale=10.0**step)
        twins.step(DRAW, adopt=step == 1, draw_next=step == 2)
        for group in groups:
            group["lr"] = group["lr"] * 0.5
        twins.scalars()


@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_samples(hess_approx: str, dtype: torch.dtype) -> None:
    twins = Twins([Spec((132,), dtype), Spec((7,), dtype)], [{**GROUP, "hess_approx": hess_approx}])
    twins.scalars(samples=3)
    twins.clear_sums()
    for sample in range(2):
        twins.sample(DRAW._replace(sample=sample), adopt=sample == 0)
        twins.new_grads(sample)
        twins.accumulate(DRAW._replace(sample=sample))
    twins.sample(DRAW._replace(sample=2))
    twins.new_grads(2)
    for side in twins.sides:
        side.slots[1].summed = False  # its first two gradients were None
    twins.step(DRAW._replace(sample=2), draw_next=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adopts_edits(dtype: torch.dtype) -> None:
    twins = Twins([Spec((132,), dtype), Spec((7,), dtype)])
    twins.restore()
    twins.edit()
    twins.sample(DRAW, adopt=True)
    twins.restore()
    twins.edit()
    twins.new_grads()
    twins.step(DRAW, adopt=True)


def test_rounds_to_nearest_even() -> None:
    """Every kind of float32, among them ties, subnormals, overflow, inf and nan."""
    bits = torch.arange(-(2**31), 2**31, 2**21 - 1).to(torch.int32)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x7F7F8000, 0x00008000, 0x33000000, 0x477FF000]).to(torch.int32)
    values = torch.cat((bits, ties)).view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        twins = Twins([Spec((values.numel(),), dtype)])
        for side in twins.sides:
            side.slots[0].mean.copy_(values)
            side.backend.restore(side.list)
        ours, theirs = (side.params[0].detach() for side in twins.sides)
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


@pytest.mark.parametrize("done", [10**3, 2**31, 2**40])
def test_large_step_counts(done: int) -> None:
    """The bias correction fades; float64 powers have the host's bits."""
    twins = Twins([Spec((8,)), Spec((8,), group=1)], [GROUP, {**GROUP, "beta1": 1 - 1e-9}])
    for side in twins.sides:
        for arena in side.arenas:
            arena.steps.fill_(done)
    twins.new_grads()
    twins.step(DRAW._replace(step=5))


@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
def test_grad_scale(hess_approx: str) -> None:
    """The GradScaler's scale is read on the device; the reference is told it by the host."""
    twins = Twins([Spec((12,))], [{**GROUP, "hess_approx": hess_approx}])
    twins.reference.rows.update(twins.groups, 1000.0, 3)
    twins.triton.rows.update(twins.groups, 1.0, 3)
    twins.new_grads(scale=1000.0)
    twins.step(DRAW, guard=Guard(found_inf=torch.zeros(1), grad_scale=torch.tensor([1000.0])))


def test_learning_rate_on_the_device() -> None:
    lr = torch.tensor(0.1, dtype=torch.float64)
    twins = Twins([Spec((12,))])
    twins.triton.rows.update([{**GROUP, "lr": lr, "capturable": True}])
    for value in (0.1, 0.025):
        lr.fill_(value)
        twins.reference.rows.update([{**GROUP, "lr": value}])
        twins.new_grads()
        twins.step(DRAW)


def _skipping(dtype: torch.dtype = torch.float32) -> tuple[Twins, list[torch.Tensor]]:
    twins = Twins([Spec((132,), dtype), Spec((5,), dtype), Spec((64,), dtype)])
    twins.sample(DRAW)
    twins.new_grads()
    bad = twins.triton.slots[1].grad
    assert bad is not None
    bad[3] = float("inf")
    return twins, [tensor.clone() for tensor in twins.triton.state()]


@pytest.mark.parametrize("dtype", slow_but(DTYPES, torch.float32))
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_check_finds_the_first(dtype: torch.dtype, value: float) -> None:
    twins = Twins([Spec((132,), dtype), Spec((5,), dtype), Spec((300,), dtype), Spec((300,), dtype)])
    twins.new_grads()
    backend, slots = twins.triton.backend, twins.triton.list
    assert backend.find_nonfinite(slots) is None
    for position, at in ((3, 0), (2, 299)):
        grad = twins.triton.slots[position].grad
        assert grad is not None
        grad[at] = value
        assert backend.find_nonfinite(slots) == position


@pytest.mark.parametrize("report", [False, True])
@pytest.mark.parametrize("by_scaler", [False, True])
def test_skipped_step(report: bool, by_scaler: bool) -> None:
    """Nothing changes but the weights, which get the mean back."""
    twins, before = _skipping()
    side = twins.triton
    backend = side.backend
    assert isinstance(backend, TritonBackend)
    if not by_scaler:
        backend.check(side.list)
    guard = Guard(found_inf=torch.ones(1) if by_scaler else None, report=report)
    backend.step(side.list, DRAW, False, False, guard)
    for old, new in zip(before[3:], side.state()[3:], strict=True):
        assert torch.equal(old, new)
    for slot in side.slots:
        assert torch.equal(slot.param.detach(), slot.mean)
    assert side.flags.block.tolist()[:3] == [2**62, 0, 0 if report else 1]
    if report:
        assert side.flags.new_report() == (2**62 if by_scaler else side.slots[1].index)
    assert side.flags.new_report() is None


def test_skipped_step_leaves_edited_weights() -> None:
    twins, before = _skipping()
    side = twins.triton
    backend = side.backend
    assert isinstance(backend, TritonBackend)
    backend.check(side.list)
    backend.step(side.list, DRAW, True, False)
    for old, new in zip(before, side.state(), strict=True):
        assert torch.equal(old, new)


def test_skipped_step_draws_the_same_step_again() -> None:
    twins, before = _skipping(torch.bfloat16)
    side = twins.triton
    backend = side.backend
    assert isinstance(backend, TritonBackend)
    backend.check(side.list)
    backend.step(side.list, DRAW._replace(sample=4), False, True)
    for old, new in zip(before, side.state(), strict=True):  # the weights held sample 0 of that step
        assert torch.equal(old, new)


def test_only_the_final_launch_forgets() -> None:
    twins, before = _skipping()
    side = twins.triton
    backend = side.backend
    assert isinstance(backend, TritonBackend)
    backend.check(side.list)
    backend.step(side.list, DRAW, False, False, Guard(final=False))
    assert side.flags.block.tolist()[:3] == [side.slots[1].index, 0, 0]
    backend.step(side.list, DRAW, False, False, Guard())
    assert side.flags.block.tolist()[:3] == [2**62, 0, 1]
    for old, new in zip(before[3:], side.state()[3:], strict=True):
        assert torch.equal(old, new)


def test_follows_gradients_that_move_and_change_dtype() -> None:
    twins = Twins([Spec((12,), torch.bfloat16), Spec((8,), torch.bfloat16)])
    twins.sample(DRAW)
    for step, dtype in enumerate((torch.bfloat16, torch.float32, torch.bfloat16)):
        twins.specs = [Spec((12,), torch.bfloat16, dtype), Spec((8,), torch.bfloat16)]
        twins.new_grads(step)
        twins.step(DRAW)


def test_follows_parameters_that_move() -> None:
    twins = Twins([Spec((12,)), Spec((6, 2))])
    twins.sample(DRAW)
    for place in (unaligned, contiguous):
        for side in twins.sides:
            for param in side.params:
                param.data = place(param.detach())
        pointers = twins.triton.list.addresses
        assert pointers is not None and pointers.moved()
        pointers.record()
        twins.new_grads()
        twins.step(DRAW)


def test_state_is_what_is_compared() -> None:
    """The comparison would notice a single bit."""
    twins = Twins([Spec((12,))])
    for key in STATE:
        getattr(twins.triton.slots[0], key).view(torch.int32)[3] ^= 1
        with pytest.raises(AssertionError):
            twins.compare()
        getattr(twins.triton.slots[0], key).view(torch.int32)[3] ^= 1


def test_refusals() -> None:
    backend = TritonBackend()
    assert backend.unavailable() is None
    assert backend.unsupported(torch.device("cpu"), torch.float32) is None
    assert "float64" in str(backend.unsupported(torch.device("cpu"), torch.float64))
    assert "TRITON_INTERPRET" in str(backend.unsupported(torch.device("cuda", 0), torch.float32))
