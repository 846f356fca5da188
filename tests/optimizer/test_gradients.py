"""What enters a step: gradients as they are at step(), several samples, and the parameters that have none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels import IVON, NonFiniteGradientError
from tests.support.helpers import assert_same, bowl, flat, parameters, snapshot, train

pytestmark = pytest.mark.usefixtures("known_normals")

OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 100.0, "hess_init": 0.5, "beta2": 0.99, "weight_decay": 0.01, "seed": 5}


def fresh(backend: str, *shapes: Any, **options: Any) -> tuple[IVON, list[nn.Parameter]]:
    params = parameters(*(shapes or ((4, 3), (5,))))
    return IVON(params, backend=backend, **{**OPTIONS, **options}), params


def one_sample(optimizer: IVON, modes: bool, body: Callable[[], None]) -> None:
    """Runs ``body`` under the next sample of this step, in either way to train."""
    if modes:
        optimizer.train()
        body()
    else:
        with optimizer.sampled_params(train=True):
            body()


both_ways = pytest.mark.parametrize("modes", [False, True], ids=["context", "modes"])


@both_ways
def test_clip_grad_norm_takes_effect(backend: str, modes: bool) -> None:
    optimizer, params = fresh(backend)
    one_sample(optimizer, modes, lambda: (1e3 * bowl(params, 0)).backward())
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    clipped = [p.grad.clone() for p in params if p.grad is not None]
    optimizer.step()
    for p, g in zip(params, clipped, strict=True):
        torch.testing.assert_close(optimizer.state[p]["momentum"], 0.1 * g)


@both_ways
@pytest.mark.parametrize("change", ["scale", "replace", "other"])
def test_gradients_changed_before_step_are_used(backend: str, modes: bool, change: str) -> None:
    """Also a gradient that another tensor replaces, as foreach clipping and DDP's buckets do."""
    optimizer, params = fresh(backend)
    one_sample(optimizer, modes, lambda: bowl(params, 0).backward())
    for p in params:
        assert p.grad is not None
        if change == "scale":
            p.grad.mul_(0.25)
        else:
            p.grad = p.grad * 0.25 if change == "replace" else torch.ones_like(p)
    used = [p.grad.clone() for p in params if p.grad is not None]
    optimizer.step()
    for p, g in zip(params, used, strict=True):
        torch.testing.assert_close(optimizer.state[p]["momentum"], 0.1 * g)


@both_ways
def test_accumulation_over_backward_calls(backend: str, modes: bool) -> None:
    expected, others = fresh(backend)
    one_sample(expected, modes, lambda: (2 * bowl(others, 0)).backward())
    expected.step()
    optimizer, params = fresh(backend)

    def twice() -> None:
        for _ in range(2):
            bowl(params, 0).backward()

    one_sample(optimizer, modes, twice)
    optimizer.step()
    assert_same(snapshot(expected), snapshot(optimizer))


def test_accumulation_with_train_called_before_every_micro_batch(backend: str) -> None:
    """The Trainer's habit: train() before each micro-batch, one step() for all of them."""
    expected, others = fresh(backend)
    expected.train()
    (3 * bowl(others, 0)).backward()
    expected.step()
    optimizer, params = fresh(backend)
    for _ in range(3):
        optimizer.train()
        bowl(params, 0).backward()
    optimizer.step()
    for p, q in zip(params, others, strict=True):
        for key in ("mean", "momentum", "hess"):
            torch.testing.assert_close(optimizer.state[p][key], expected.state[q][key])


def zeroing(name: str, optimizer: IVON, params: list[nn.Parameter]) -> None:
    if name.startswith("optimizer"):
        optimizer.zero_grad(set_to_none=name.endswith("none"))
    elif name.startswith("model"):
        module = nn.Module()
        module.params = nn.ParameterList(params)
        module.zero_grad(set_to_none=name.endswith("none"))


ZEROING = ["never", "optimizer to none", "optimizer to zero", "model to none", "model to zero"]


@both_ways
@pytest.mark.parametrize("name", ZEROING)
@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
def test_several_samples_average_each_gradient_once(backend: str, modes: bool, name: str, hess_approx: str) -> None:
    """With dyadic slopes the sums are exact, so that even accumulated gradients must give the same bits."""
    slopes = torch.tensor([[1.0, 2.0, -4.0], [0.5, -1.0, 8.0], [3.0, 0.25, 1.0]])

    def run(zero: str, in_modes: bool) -> dict[str, Tensor]:
        optimizer, params = fresh(backend, 3, mc_samples=3, hess_approx=hess_approx)
        for _ in range(2):
            optimizer.zero_grad()
            for i, slope in enumerate(slopes):
                if in_modes and i:
                    optimizer.next_sample()
                if i:
                    zeroing(zero, optimizer, params)
                one_sample(optimizer, in_modes, lambda slope=slope: (slope * params[0]).sum().backward())
            optimizer.step()
        return snapshot(optimizer)

    if name == "model to zero" and not modes:
        # A block's gradient is read at the next one, so that clipping can come between: zeros written into it by
        # something that the optimizer does not see are refused, never averaged.
        with pytest.raises(RuntimeError, match="zeroed in place"):
            run(name, modes)
    else:
        assert_same(run("optimizer to none", False), run(name, modes))


@pytest.mark.parametrize("name", ZEROING[1:])
def test_zero_grad_inside_the_block(backend: str, name: str) -> None:
    slopes = torch.tensor([[1.0, 2.0, -4.0], [0.5, -1.0, 8.0]])
    optimizer, params = fresh(backend, 3, mc_samples=2)
    for slope in slopes:
        with optimizer.sampled_params(train=True):
            zeroing(name, optimizer, params)
            (slope * params[0]).sum().backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[params[0]]["momentum"], 0.1 * slopes.mean(0))


def test_fewer_or_more_blocks_than_mc_samples_average_what_was_drawn(backend: str) -> None:
    for declared, drawn in ((4, 2), (1, 3)):
        optimizer, params = fresh(backend, 3, mc_samples=declared)
        for i in range(drawn):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                ((i + 1.0) * params[0]).sum().backward()
        optimizer.step()
        expected = torch.full((3,), 0.1 * (drawn + 1) / 2)
        torch.testing.assert_close(optimizer.state[params[0]]["momentum"], expected)


# --- nothing to do --------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("kind", ["unused", "frozen", "None after backward"])
def test_a_parameter_without_gradient_is_left_alone(backend: str, modes: bool, kind: str) -> None:
    expected, others = fresh(backend, 4)
    optimizer, (used, left) = fresh(backend, 4, 5, weight_decay=0.01)
    left.requires_grad_(kind != "frozen")
    before = {key: torch.as_tensor(value).clone() for key, value in optimizer.state[left].items()}
    mean = left.detach().clone()

    def body() -> None:
        if kind == "frozen":
            assert torch.equal(left, mean), "a frozen parameter is not sampled"
        bowl([used, left] if kind == "None after backward" else [used], 0).backward()
        if kind == "None after backward":
            left.grad = None

    for _ in range(3):
        optimizer.zero_grad()
        expected.zero_grad()
        one_sample(expected, modes, lambda: bowl(others, 0).backward())
        expected.step()
        one_sample(optimizer, modes, body)
        optimizer.step()
    assert torch.equal(left, mean)
    assert_same(before, {key: torch.as_tensor(value) for key, value in optimizer.state[left].items()})
    assert torch.equal(used, others[0]), "the other parameters train as if it were not there"


@pytest.mark.on_triton
def test_a_parameter_in_some_blocks_only_averages_over_all_samples(backend: str) -> None:
    """No gradient in a block that ran means a zero gradient there, as for any unused expert or branch."""
    optimizer, (always, sometimes) = fresh(backend, 3, 3, mc_samples=2)
    for i in range(2):
        optimizer.zero_grad()
        with optimizer.sampled_params(train=True):
            (always.sum() + (4 * sometimes.sum() if i == 0 else 0.0)).backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[always]["momentum"], torch.full((3,), 0.1))
    torch.testing.assert_close(optimizer.state[sometimes]["momentum"], torch.full((3,), 0.2))


def test_a_parameter_that_is_unfrozen_between_samples_joins_them(backend: str) -> None:
    always, late = parameters(3, 3)
    late.requires_grad_(False)
    optimizer = IVON([always, late], backend=backend, mc_samples=4, **OPTIONS)
    for i in range(4):
        optimizer.zero_grad()
        late.requires_grad_(i >= 2)
        with optimizer.sampled_params(train=True):
            (always.sum() + 4 * late.sum()).backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[always]["momentum"], torch.full((3,), 0.1))
    torch.testing.assert_close(optimizer.state[late]["momentum"], torch.full((3,), 0.2))


@pytest.mark.on_triton
def test_a_parameter_that_joins_late_is_debiased_by_its_own_count(backend: str) -> None:
    optimizer, (early, late) = fresh(backend, 3, 3, rescale_lr=False, weight_decay=0.0)
    train(optimizer, [early], 5)
    optimizer.zero_grad()
    with optimizer.sampled_params(train=True):
        (early.sum() + late.sum()).backward()
    before, hess = late.detach().clone(), optimizer.state[late]["hess"]
    optimizer.step()
    torch.testing.assert_close(late.detach(), before - 0.1 / hess)
    assert int(optimizer.state[early]["step"]) == 6 and int(optimizer.state[late]["step"]) == 1


def test_all_parameters_without_gradient(backend: str) -> None:
    optimizer, params = fresh(backend)
    train(optimizer, params, 1)
    optimizer.zero_grad()
    before = snapshot(optimizer)
    with optimizer.sampled_params(train=True):
        pass
    optimizer.step()
    assert_same(before, snapshot(optimizer))
    train(optimizer, params, 1)
    assert not torch.equal(flat(params), before["0.param"].new_zeros(0)) and flat(params).isfinite().all()


@pytest.mark.on_triton
def test_empty_groups_and_empty_parameters(backend: str) -> None:
    expected, others = fresh(backend, 4)
    train(expected, others, 3)
    params = parameters(4)
    empty = nn.Parameter(torch.empty(0, 3))
    optimizer = IVON([{"params": params}, {"params": []}, {"params": [empty]}], backend=backend, **OPTIONS)
    train(optimizer, [*params, empty], 3)
    assert torch.equal(flat(params), flat(others))


# --- refusals -------------------------------------------------------------------------------------------------------


def sparse_gradient() -> nn.Parameter:
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    return embedding.weight


def test_sparse_gradients_are_refused(backend: str) -> None:
    p = sparse_gradient()
    optimizer = IVON([p], backend=backend, **OPTIONS)
    before = snapshot(optimizer)
    optimizer.train()
    with pytest.raises((RuntimeError, TypeError, ValueError), match="sparse"):
        optimizer.step()
    optimizer.discard_samples()
    assert_same(before, snapshot(optimizer))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_refused(backend: str, dtype: torch.dtype) -> None:
    with pytest.raises((TypeError, ValueError), match="complex"):
        IVON([nn.Parameter(torch.ones(3, dtype=dtype))], backend=backend, **OPTIONS)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64]
)
def test_frozen_parameters_of_any_dtype_are_left_alone(backend: str, dtype: torch.dtype) -> None:
    """Quantized weights, for example, of a model that was passed whole."""
    frozen = nn.Parameter(torch.ones(5).to(dtype), requires_grad=False)
    weight = nn.Parameter(torch.ones(3))
    optimizer = IVON([frozen, weight], backend=backend, **OPTIONS)
    for _ in range(2):
        optimizer.train()
        weight.square().sum().backward()
        optimizer.step()
    assert torch.equal(frozen, torch.ones(5).to(dtype)) and float(weight.detach().min()) < 1
    assert list(optimizer.state) == [weight]
    optimizer.load_state_dict(optimizer.state_dict())


def test_sparse_parameters_are_refused(backend: str) -> None:
    p = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises((TypeError, ValueError), match="sparse"):
        IVON([p], backend=backend, **OPTIONS)


# --- non-finite gradients -------------------------------------------------------------------------------------------

BAD = [float("nan"), float("inf"), float("-inf")]


def poison(params: list[nn.Parameter], value: float) -> None:
    """One bad element, the last of the last parameter: everything else is finite."""
    grad = params[-1].grad
    assert grad is not None
    grad.view(-1)[-1] = value


@both_ways
@pytest.mark.parametrize("value", BAD)
def test_non_finite_gradients_raise_before_anything_changes(backend: str, modes: bool, value: float) -> None:
    params = parameters((4, 3), 1025)
    optimizer = IVON([("first", params[0]), ("second.weight", params[1])], backend=backend, **OPTIONS)
    train(optimizer, params, 2)
    before = snapshot(optimizer)
    optimizer.zero_grad()
    one_sample(optimizer, modes, lambda: bowl(params, 2).backward())
    poison(params, value)
    with pytest.raises(NonFiniteGradientError, match=r"second\.weight"):
        optimizer.step()
    optimizer.discard_samples()
    assert_same(before, snapshot(optimizer))


@pytest.mark.on_triton
def test_non_finite_gradients_without_names_tell_the_position(backend: str) -> None:
    params = parameters(4, 5)
    optimizer = IVON([{"params": params[:1]}, {"params": params[1:]}], backend=backend, **OPTIONS)
    optimizer.train()
    bowl(params, 0).backward()
    poison(params, float("nan"))
    with pytest.raises(NonFiniteGradientError, match="1"):
        optimizer.step()


@pytest.mark.on_triton
def test_the_step_after_an_error_is_as_if_it_had_not_been(backend: str) -> None:
    expected, others = fresh(backend)
    train(expected, others, 3)
    optimizer, params = fresh(backend)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.train()
        bowl(params, step).backward()
        good = [p.grad.clone() for p in params if p.grad is not None]
        poison(params, float("nan"))
        with pytest.raises(NonFiniteGradientError):
            optimizer.step()
        for p, g in zip(params, good, strict=True):
            p.grad = g
        optimizer.train()
        optimizer.step()
    assert_same(snapshot(expected), snapshot(optimizer))


@both_ways
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("samples", [1, 2])
def test_skip_leaves_the_step_out_and_counts_it(backend: str, modes: bool, value: float, samples: int) -> None:
    expected, others = fresh(backend, mc_samples=samples)
    train(expected, others, 3, samples=samples)
    optimizer, params = fresh(backend, mc_samples=samples, nonfinite="skip")
    for step in range(3):
        for bad in (True, False):
            for sample in range(samples):
                if modes and sample:
                    optimizer.next_sample()

                def body(step: int = step, last: bool = bad and sample == samples - 1) -> None:
                    optimizer.zero_grad()
                    bowl(params, step).backward()
                    if last:
                        poison(params, value)

                one_sample(optimizer, modes, body)
            optimizer.step()
    assert optimizer.skipped_steps == 3
    assert_same(snapshot(expected), snapshot(optimizer))


@pytest.mark.on_triton
def test_non_finite_in_an_earlier_sample_is_noticed(backend: str) -> None:
    optimizer, params = fresh(backend, mc_samples=2)
    before = snapshot(optimizer)
    for value in (float("nan"), 1.0):
        optimizer.zero_grad()
        with optimizer.sampled_params(train=True):
            (value * bowl(params, 0)).backward()
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()
    optimizer.discard_samples()
    assert_same(before, snapshot(optimizer))


def test_a_copy_remembers_a_non_finite_sample(backend: str) -> None:
    optimizer, params = fresh(backend, mc_samples=2)
    for value in (float("nan"), 1.0):
        optimizer.zero_grad()
        with optimizer.sampled_params(train=True):
            (value * bowl(params, 0)).backward()
    twin = copy.deepcopy(optimizer)
    before = snapshot(twin)
    with pytest.raises(NonFiniteGradientError):
        twin.step()
    assert_same(before, snapshot(twin))


@pytest.mark.on_triton
def test_huge_finite_gradients_are_no_error(backend: str) -> None:
    optimizer, params = fresh(backend, clip_radius=0.1, rescale_lr=False)
    optimizer.train()
    bowl(params, 0).backward()
    for p in params:
        p.grad = torch.full_like(p, 1e18)
    before = flat(params)
    optimizer.eval()
    mean = flat(params)
    optimizer.step()
    assert flat(params).isfinite().all() and not torch.equal(before, mean)
    assert (flat(params) - mean).abs().max() <= 0.1 * 0.1 * 1.001


@pytest.mark.on_triton
def test_nonfinite_gradients_can_be_let_through(backend: str) -> None:
    """As torch's own optimizers do: the check costs a pass over the gradients."""
    optimizer, params = fresh(backend, nonfinite="ignore")
    for bad in (False, True):
        optimizer.train()
        for i, p in enumerate(params):
            p.grad = torch.full_like(p, float("nan") if bad and i == 0 else 0.5)
        optimizer.step()
        assert bool(params[0].isfinite().all()) is not bad
    assert params[1].isfinite().all()
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("value", ["", "never", None])
def test_nonfinite_is_validated(backend: str, value: Any) -> None:
    with pytest.raises(ValueError, match="nonfinite"):
        fresh(backend, nonfinite=value)
