"""The traps of ivon-opt 0.1.3, as one table: each check springs there and passes here.

A check gets a constructor with ivon-opt's signature. It uses only what both have, and says in its assertion what went
wrong; the table says which failure ivon-opt must show, so that a check which fails there for another reason is noticed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import ivon
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from ivon_kernels import IVON
from tests.support.helpers import bowl, flat, parameters, state, train
from tests.support.ranks import Ranks

Make = Callable[..., Any]


def step(optimizer: Any, params: list[nn.Parameter], loss: Callable[..., Tensor] = bowl) -> None:
    with optimizer.sampled_params(train=True):
        optimizer.zero_grad()
        loss(params, 0).backward()
    optimizer.step()


def exception_leaves_weights_perturbed(make: Make) -> None:
    params = parameters(6)
    before = flat(params)
    with contextlib.suppress(KeyboardInterrupt), make(params, lr=0.1, ess=10.0).sampled_params(train=True):
        raise KeyboardInterrupt
    assert torch.equal(flat(params), before), "weights stay perturbed"


def continues_alike(make: Make, copied: Callable[[Any, Any], tuple[Any, list[nn.Parameter]]]) -> None:
    """Trains, copies the optimizer in some way, and takes one step in both with the same randomness."""
    params = parameters(6, 3)
    optimizer = make(params, lr=0.1, ess=100.0)
    train(optimizer, params, 5)
    other, other_params = copied(optimizer, params)
    rng = torch.get_rng_state()
    train(optimizer, params, 1, start=5)
    torch.set_rng_state(rng)
    train(other, other_params, 1, start=5)
    torch.testing.assert_close(flat(other_params), flat(params), rtol=0, atol=0, msg="the step after it differs")


def resume_forgets_the_step(make: Make) -> None:
    def resumed(optimizer: Any, params: list[nn.Parameter]) -> tuple[Any, list[nn.Parameter]]:
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        others = [nn.Parameter(p.detach().clone()) for p in params]
        other = make(others, lr=0.1, ess=100.0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        return other, others

    continues_alike(make, resumed)


def copy_forgets_the_step(make: Make, duplicate: Callable[[Any], Any]) -> None:
    def copied(optimizer: Any, params: list[nn.Parameter]) -> tuple[Any, list[nn.Parameter]]:
        other = duplicate(optimizer)
        return other, other.param_groups[0]["params"]

    continues_alike(make, copied)


def unused_parameter(make: Make) -> None:
    used, unused = parameters(4, 5)
    before = unused.detach().clone()
    step(make([used, unused], lr=0.1, ess=10.0), [used])
    assert torch.equal(unused, before), "an unused parameter is decayed"


def frozen_parameter(make: Make, sampled: bool) -> None:
    used, frozen = parameters(4, 5)
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    optimizer = make([used, frozen], lr=0.1, ess=10.0, weight_decay=0.1)
    with optimizer.sampled_params(train=True):
        inside = frozen.detach().clone()
        used.sum().backward()
    optimizer.step()
    if sampled:
        assert torch.equal(inside, before), "a frozen parameter is sampled"
    else:
        assert torch.equal(frozen, before), "a frozen parameter is decayed"


def step_without_sample(make: Make) -> None:
    params = parameters(4)
    optimizer = make(params, lr=0.1, ess=10.0)
    bowl(params, 0).backward()
    with pytest.raises(RuntimeError):
        optimizer.step()


def clip_after_the_context(make: Make) -> None:
    params = parameters(4)
    optimizer = make(params, lr=0.1, ess=1e6)
    with optimizer.sampled_params(train=True):
        (1e3 * params[0].sum()).backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    assert state(optimizer, "momentum").norm() <= 0.1 * 1.001, "the clipped gradient is not used"


def contexts_without_zero_grad(make: Make) -> None:
    slope = torch.tensor([1.0, 2.0, 3.0])
    params = parameters(3)
    optimizer = make(params, lr=0.1, ess=1e6, mc_samples=2)
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            (slope * params[0]).sum().backward()
    optimizer.step()
    torch.testing.assert_close(state(optimizer, "momentum"), 0.1 * slope, msg="not the mean over the samples")


def scaler_unscales(make: Make) -> None:
    params = parameters(3)
    optimizer = make(params, lr=0.1, ess=1e6)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with optimizer.sampled_params(train=True):
        scaler.scale(params[0].sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(state(optimizer, "momentum"), torch.full((3,), 0.1), msg="the gradient is still scaled")


def scaler_skips(make: Make) -> None:
    params = parameters(3)
    optimizer = make(params, lr=0.1, ess=1e6)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        with optimizer.sampled_params(train=True):
            scaler.scale(factor * params[0].sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert flat(params).isfinite().all(), "the skipped step poisons the next"


def bfloat16_moves(make: Make) -> None:
    params = parameters(1000, dtype=torch.bfloat16)
    before = flat(params)
    optimizer = make(params, lr=1e-3, ess=1e9, rescale_lr=False, beta1=0.0)
    for _ in range(50):
        with optimizer.sampled_params(train=True):
            params[0].grad = before.sign()
        optimizer.step()
    moved = float((flat(params) != before).float().mean())
    assert moved > 0.9, "most weights never move"


def float16_noise(make: Make) -> None:
    params = [nn.Parameter(torch.zeros(1000, dtype=torch.float16))]
    optimizer = make(params, lr=1e-3, ess=1e6)
    with optimizer.sampled_params(train=True):
        nonzero = float((params[0] != 0).float().mean())
        params[0].grad = torch.ones_like(params[0])
    assert nonzero > 0.9, "the noise is zero"


def closure_samples(make: Make) -> None:
    params = parameters(8)
    optimizer = make(params, lr=0.1, ess=10.0, mc_samples=3)
    before, seen = flat(params), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(flat(params))
        loss = bowl(params, 0)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(seen) == 3 and not any(torch.equal(weights, before) for weights in seen), "the closure saw no samples"


def added_group(make: Make) -> None:
    params = parameters(4, 5)
    optimizer = make(params[:1], lr=0.1, ess=10.0)
    optimizer.add_param_group({"params": params[1:]})
    before = flat(params[1:])
    step(optimizer, params)
    assert not torch.equal(flat(params[1:]), before)


def empty_group(make: Make) -> None:
    params = parameters(4)
    step(make([{"params": params}, {"params": []}], lr=0.1, ess=10.0), params)


def gradsq_with_sync(make: Make) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        params = parameters(4)
        step(make(params, lr=0.1, ess=10.0, hess_approx="gradsq", sync=True), params)
    finally:
        dist.destroy_process_group()


def mixed_dtypes(make: Make) -> None:
    params = parameters(4) + parameters(5, dtype=torch.bfloat16)
    step(make(params, lr=0.1, ess=10.0), params)


def mixed_devices(make: Make) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU as the second device")
    params = [*parameters(4), nn.Parameter(torch.ones(5, device="cuda"))]
    optimizer = make(params, lr=0.1, ess=10.0)
    with optimizer.sampled_params(train=True):
        for p in params:
            p.sum().backward()
    optimizer.step()


def state_cast_on_load(make: Make) -> None:
    params = parameters(4)
    optimizer = make(params, lr=0.1, ess=10.0)
    train(optimizer, params, 2)
    doubles = [nn.Parameter(p.detach().double()) for p in params]
    other = make(doubles, lr=0.1, ess=10.0)
    other.load_state_dict(optimizer.state_dict())
    assert state(other, "hess").dtype == torch.float64, "the state keeps the dtype of another model"


def distributed_checkpoint(make: Make) -> None:
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters(), lr=0.1, ess=10.0)
    step(optimizer, list(model.parameters()))
    set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))


def views_of_one_buffer(make: Make) -> None:
    model = nn.Sequential(nn.Linear(500, 500), nn.Linear(10, 4))
    optimizer = make(model.parameters(), lr=0.1, ess=1000.0)
    step(optimizer, list(model.parameters()))
    buffer = io.BytesIO()
    torch.save(model[1].state_dict(), buffer)
    assert buffer.tell() < 10_000, "saving the head saves the whole model"


def evaluation_moves_the_global_rng(make: Make) -> None:
    optimizer = make(parameters(4), lr=0.1, ess=10.0)
    before = torch.get_rng_state()
    with optimizer.sampled_params():
        pass
    assert torch.equal(torch.get_rng_state(), before), "the global RNG moved"


def nan_poisons(make: Make) -> None:
    params = parameters(4)
    optimizer = make(params, lr=0.1, ess=10.0)
    with contextlib.suppress(RuntimeError):
        step(optimizer, params, lambda p, _: p[0].sum() * float("nan"))
    train(optimizer, params, 3)
    assert state(optimizer, "hess").isfinite().all() and flat(params).isfinite().all(), "the state stays NaN"


class Rank(NamedTuple):
    """What one of two DDP ranks ends with: its weights and its mean Hessian, or why the optimizer refused to run."""

    weights: Tensor
    hess: float
    refusal: str = ""


CURVATURE = 4.0


def fit_under_ddp(make: Make, sync: bool) -> Rank:
    """Fits a quadratic of known curvature. Each rank has its own global seed, as ranks that load data have."""
    model = nn.Linear(4096, 1, bias=False)
    nn.init.zeros_(model.weight)
    replica = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(dist.get_rank())
    optimizer = make(model.parameters(), lr=1e-2, ess=100.0, beta2=0.98, hess_init=CURVATURE, sync=sync)
    try:
        for _ in range(40):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                unused = replica(torch.zeros(1, 4096)).sum()  # DDP wants its forward; the loss reads the weights
                (unused + 0.5 * CURVATURE * model.weight.square().sum()).backward()
            optimizer.step()
    except RuntimeError as error:
        return Rank(torch.zeros(0), math.nan, str(error))
    return Rank(model.weight.detach().clone(), float(state(optimizer, "hess").mean()))


class Trap(NamedTuple):
    """One trap: the check, and how ivon-opt fails in it (exception type and a part of its message)."""

    check: Callable[[Make], None]
    symptom: type[BaseException]
    message: str = ""
    not_on_ivon_opt: str = ""


TRAPS: dict[str, Trap] = {
    "exception in the context": Trap(exception_leaves_weights_perturbed, AssertionError, "weights stay perturbed"),
    "current_step lost on save": Trap(resume_forgets_the_step, AssertionError, "the step after it differs"),
    "unused parameter crashes": Trap(unused_parameter, AttributeError, "NoneType"),
    "frozen parameter is sampled": Trap(
        functools.partial(frozen_parameter, sampled=True), AssertionError, "a frozen parameter is sampled"
    ),
    "frozen parameter is decayed": Trap(
        functools.partial(frozen_parameter, sampled=False), AssertionError, "a frozen parameter is decayed"
    ),
    "step without a sample": Trap(step_without_sample, TypeError, "NoneType"),
    "clipping after the context": Trap(clip_after_the_context, AssertionError, "the clipped gradient is not used"),
    "contexts without zero_grad": Trap(contexts_without_zero_grad, AssertionError, "not the mean over the samples"),
    "GradScaler never unscales": Trap(scaler_unscales, AssertionError, "the gradient is still scaled"),
    "skipped step poisons the next": Trap(scaler_skips, AssertionError, "the skipped step poisons the next"),
    "bfloat16 weights do not move": Trap(bfloat16_moves, AssertionError, "most weights never move"),
    "float16 noise is zero": Trap(float16_noise, AssertionError, "the noise is zero"),
    "step(closure) does not sample": Trap(closure_samples, TypeError, "NoneType"),
    "add_param_group": Trap(added_group, KeyError, "numel"),
    "empty group": Trap(empty_group, ValueError, "non-empty list"),
    "gradsq with sync": Trap(gradsq_with_sync, TypeError, "NoneType"),
    "mixed dtypes": Trap(mixed_dtypes, ValueError, "different dtypes"),
    "mixed devices": Trap(mixed_devices, ValueError, "different devices"),
    "state not cast on load": Trap(state_cast_on_load, AssertionError, "keeps the dtype of another model"),
    "torch.distributed.checkpoint": Trap(distributed_checkpoint, KeyError, "count"),
    "deepcopy drops counters": Trap(
        functools.partial(copy_forgets_the_step, duplicate=copy.deepcopy), AttributeError, "has no attribute"
    ),
    "pickle drops counters": Trap(
        functools.partial(copy_forgets_the_step, duplicate=lambda o: pickle.loads(pickle.dumps(o))),
        AttributeError,
        "has no attribute",
    ),
    "parameters become views": Trap(views_of_one_buffer, AssertionError, "saving the head saves the whole model"),
    "evaluation moves the global RNG": Trap(evaluation_moves_the_global_rng, AssertionError, "the global RNG moved"),
    "NaN batch poisons the state": Trap(nan_poisons, AssertionError, "the state stays NaN"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_ivon_opt_falls_into(name: str) -> None:
    trap = TRAPS[name]
    if trap.not_on_ivon_opt:
        pytest.skip(trap.not_on_ivon_opt)
    with pytest.raises(trap.symptom, match=trap.message):
        trap.check(ivon.IVON)


@pytest.mark.parametrize("chosen", [None, "reference"])
@pytest.mark.parametrize("name", TRAPS)
def test_ours_does_not(name: str, chosen: str | None) -> None:
    TRAPS[name].check(functools.partial(IVON, backend=chosen))


def ranks_agree(first: Rank, second: Rank) -> None:
    assert torch.equal(first.weights, second.weights), "the ranks diverge"


def curvature_is_right(first: Rank, second: Rank) -> None:
    """Or refused, in both ranks: DDP averages gradients that each rank's own noise must meet first."""
    for rank in (first, second):
        # An estimate is 4 noise^2, with variance 2 * 16: over 4096 elements and the 99 steps that beta2 = 0.98 averages
        # the standard deviation is 0.01, and the update's own bias (1 - beta2) 32 / (2 * 4) = 0.08.
        right = abs(rank.hess - CURVATURE) < 0.13
        assert right or "average" in rank.refusal, "the Hessian is divided by the world size"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sync", "check", "message"),
    [(False, ranks_agree, "the ranks diverge"), (True, curvature_is_right, "the Hessian is divided by the world size")],
    ids=["different seeds diverge", "sync divides the Hessian"],
)
def test_two_ranks(ranks: Ranks, sync: bool, check: Callable[[Rank, Rank], None], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(*ranks.run(2, fit_under_ddp, ivon.IVON, sync))
    check(*ranks.run(2, fit_under_ddp, IVON, sync))
