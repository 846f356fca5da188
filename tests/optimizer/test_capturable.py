"""``capturable=True`` without a GPU: the learning rate on the device, replayed steps, and reports that come late."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from ivon_kernels import IVON, NonFiniteGradientError
from ivon_kernels.backends.state import DeviceFlags
from tests.support.capture import Capture
from tests.support.helpers import assert_same, bowl, flat, parameters, snapshot, through_file, train, train_modes
from tests.support.matrix import EMULATED, INTERPRETED, Target

OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 100.0, "hess_init": 0.5, "beta2": 0.99, "weight_decay": 0.01, "seed": 77}
SHAPES = ((4, 3), (5,), (8,))
Schedule = Callable[[torch.optim.Optimizer], Any]


@pytest.fixture(params=[EMULATED, INTERPRETED], ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    chosen: Target = request.param
    with chosen.in_use():
        yield chosen


def fresh(
    target: Target, *, capturable: bool = True, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[IVON, list[nn.Parameter]]:
    """Two groups, the second with a learning rate of its own."""
    params = parameters(*SHAPES, dtype=dtype)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.03, "beta1": 0.8}]
    return IVON(groups, backend=target.backend, capturable=capturable, **{**OPTIONS, **options}), params


def rates(optimizer: IVON) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


# ---- the learning rate ----------------------------------------------------------------------------------------------


def test_the_learning_rate_is_a_tensor_on_the_device(target: Target) -> None:
    optimizer, params = fresh(target)
    for group, value in zip(optimizer.param_groups, (0.1, 0.03), strict=True):
        assert isinstance(group["lr"], Tensor) and group["lr"].dtype == torch.float64 and group["lr"].dim() == 0
        assert group["lr"].device == params[0].device and float(group["lr"]) == value
    added = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [added], "lr": torch.tensor(0.25)})
    assert optimizer.param_groups[2]["lr"].dtype == torch.float64 and rates(optimizer)[2] == 0.25
    plain, _ = fresh(target, capturable=False)
    assert [type(group["lr"]) for group in plain.param_groups] == [float, float]


@pytest.mark.parametrize("options", [{}, {"sample_in_step": True}, {"rescale_lr": False, "debias": False}], ids=str)
def test_the_same_bits_as_without(target: Target, options: dict[str, Any]) -> None:
    runs = []
    for capturable in (False, True):
        optimizer, params = fresh(target, capturable=capturable, dtype=torch.bfloat16, **options)
        train_modes(optimizer, params, 2, samples=2)
        train(optimizer, params, 2, start=2)
        runs.append(snapshot(optimizer))
    assert_same(*runs)


SCHEDULES: dict[str, Schedule] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 3),
    "step": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=6, cycle_momentum=False),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_fill_it_in_place(target: Target, name: str) -> None:
    runs, seen = [], []
    for capturable in (False, True):
        optimizer, params = fresh(target, capturable=capturable)
        held = [group["lr"] for group in optimizer.param_groups]
        schedule = SCHEDULES[name](optimizer)
        values = []
        for step in range(4):
            train(optimizer, params, 1, start=step)
            values.append(rates(optimizer))
            schedule.step()
        if capturable:
            assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, held, strict=True))
        runs.append(snapshot(optimizer))
        seen.append(values)
    assert seen[0] == seen[1] and seen[0][0] != seen[0][1]
    assert_same(*runs)


def test_reduce_on_plateau_fills_it_in_place(target: Target) -> None:
    optimizer, _ = fresh(target)
    held = optimizer.param_groups[0]["lr"]
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(3):
        schedule.step(1.0)
    assert optimizer.param_groups[0]["lr"] is held and rates(optimizer) == [0.025, 0.0075]


@pytest.mark.parametrize("value", [0.02, torch.tensor(0.25), torch.tensor([0.5], dtype=torch.float64)], ids=str)
def test_an_assigned_number_is_followed(target: Target, value: float | Tensor) -> None:
    runs = []
    for capturable in (False, True):
        optimizer, params = fresh(target, capturable=capturable)
        held = optimizer.param_groups[0]["lr"]
        train(optimizer, params, 2)
        optimizer.param_groups[0]["lr"] = value
        train(optimizer, params, 2, start=2)
        if capturable:
            assert optimizer.param_groups[0]["lr"] is held and float(held) == float(value)
        runs.append(snapshot(optimizer))
    assert_same(*runs)


# ---- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_by", [False, True])
@pytest.mark.parametrize("loaded_by", [False, True])
def test_state_dicts_load_both_ways(target: Target, saved_by: bool, loaded_by: bool) -> None:
    first, params = fresh(target, capturable=saved_by)
    train(first, params, 2)
    first.param_groups[0]["lr"] = 0.07
    first.eval()
    saved = through_file(first.state_dict())
    second, others = fresh(target, capturable=loaded_by, lr=0.5, seed=1)
    train(second, others, 1)
    held = [group["lr"] for group in second.param_groups]
    second.load_state_dict(saved)
    assert rates(second) == [0.07, 0.03]
    for group, lr in zip(second.param_groups, held, strict=True):
        assert group["capturable"] is loaded_by
        assert group["lr"] is lr if loaded_by else type(group["lr"]) is float
    for optimizer, weights in ((first, params), (second, others)):
        train(optimizer, weights, 3, start=2)
    assert_same(snapshot(first), snapshot(second))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_copies_are_independent(target: Target, how: Callable[[Any], Any]) -> None:
    first, params = fresh(target)
    train(first, params, 2)
    second, others = how((first, params))
    assert second.defaults["capturable"] and isinstance(second.param_groups[0]["lr"], Tensor)
    first.param_groups[0]["lr"].fill_(0.0)
    assert rates(second) == [0.1, 0.03]
    first.param_groups[0]["lr"].fill_(0.1)
    for optimizer, weights in ((first, params), (second, others)):
        train(optimizer, weights, 3, start=2)
    assert_same(snapshot(first), snapshot(second))


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference", None])
def test_another_backend_is_an_error_at_the_first_sample(backend: str | None) -> None:
    params = parameters(*SHAPES)
    optimizer = IVON(params, backend=backend, capturable=True, **OPTIONS)
    before = flat(params)
    for draw in (optimizer.train, optimizer.sampled_params(train=True).__enter__):
        with pytest.raises(RuntimeError, match=r"capturable=True needs the triton or the cuda backend"):
            draw()
        with pytest.raises(RuntimeError, match="without a sample"):  # the one that failed does not count
            optimizer.step()
        assert torch.equal(flat(params), before)


def test_a_group_on_several_devices_is_refused(target: Target) -> None:
    optimizer, params = fresh(target)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.empty(2, device="meta"), requires_grad=False))
    with pytest.raises(ValueError, match=r"parameter group 0 on one device"):
        optimizer.train()
    assert torch.equal(flat(params), flat(parameters(*SHAPES)))


@pytest.mark.parametrize("what", ["train", "step"])
def test_a_capture_without_capturable_is_an_error(target: Target, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    optimizer, params = fresh(target, capturable=False)
    train(optimizer, params, 2)
    if what == "step":
        optimizer.train()
        bowl(params, 2).backward()
    before = flat(params)
    with monkeypatch.context() as patch:
        patch.setattr(optimizer._parameters.active, "on_cuda", True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="was built with capturable=False"):
            getattr(optimizer, what)()
    assert torch.equal(flat(params), before)
    optimizer.discard_samples()
    train(optimizer, params, 1, start=2)
    expected, others = fresh(target, capturable=False)
    train(expected, others, 3)
    assert_same(snapshot(expected), snapshot(optimizer))


# ---- replays --------------------------------------------------------------------------------------------------------


def gradients(step: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def train_step(optimizer: IVON) -> None:
    optimizer.train()
    optimizer.step()


@pytest.mark.parametrize("in_step", [False, True], ids=["train and step", "sample_in_step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replays_equal_the_eager_run(
    target: Target, monkeypatch: pytest.MonkeyPatch, in_step: bool, dtype: torch.dtype
) -> None:
    """Of one captured step, with a schedule; then the eager loop goes on, and the graph can still be replayed."""
    capture = Capture(target.backend, monkeypatch)
    runs = []
    for captured in (False, True):
        optimizer, params = fresh(target, capturable=captured, dtype=dtype, sample_in_step=in_step)
        schedule = lr_scheduler.LambdaLR(optimizer, lambda step: math.exp(-0.3 * step))
        buffers = [torch.empty_like(p) for p in params]
        weights = []
        for step in range(6):
            replayed = captured and 2 <= step != 4
            for p, buffer, grad in zip(params, buffers, gradients(step, dtype), strict=True):
                p.grad = buffer.copy_(grad) if replayed else grad
            if captured and step == 2:  # with gradients at addresses that the eager steps did not have
                before = snapshot(optimizer)
                with capture.record():
                    train_step(optimizer)
                assert_same(before, snapshot(optimizer))
            if replayed:
                capture.replay()
            else:
                train_step(optimizer)
            weights.append(flat(params))
            schedule.step()
        if in_step:
            assert len({tuple(w.tolist()) for w in weights}) == len(weights)
        optimizer.eval()
        state = optimizer.state_dict()
        assert all(int(entry["step"]) == 6 for entry in state["state"].values())
        runs.append({**snapshot(optimizer), "weights": torch.stack(weights)})
    assert_same(*runs)


def test_replays_keep_the_hyperparameters_of_the_capture(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the learning rate: an eager step with others does not reach the graph."""
    capture = Capture(target.backend, monkeypatch)
    runs = []
    for captured in (False, True):
        optimizer, params = fresh(target, capturable=True)
        for p in params:
            p.grad = torch.ones_like(p)
        train_step(optimizer)
        if captured:
            with capture.record():
                train_step(optimizer)
        optimizer.param_groups[0]["ess"] = 7.0
        train_step(optimizer)
        optimizer.param_groups[0]["ess"] = OPTIONS["ess"]
        if captured:
            capture.replay()
        else:
            train_step(optimizer)
        runs.append(snapshot(optimizer))
    assert_same(*runs)


def test_replays_of_equal_gradients_draw_fresh_noise(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = Capture(target.backend, monkeypatch)
    optimizer, params = fresh(target, lr=0.0, beta2=0.0)
    for p in params:
        p.grad = torch.ones_like(p)
    train_step(optimizer)
    with capture.record():
        train_step(optimizer)
    seen = []
    for _ in range(3):
        capture.replay()
        seen.append(flat([optimizer.state[p]["hess"] for p in params]))
    assert len({tuple(hess.tolist()) for hess in seen}) == 3


def test_a_replayed_step_with_bad_gradients_is_not_taken(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = Capture(target.backend, monkeypatch)
    optimizer, params = fresh(target, nonfinite="skip")
    for p in params:
        p.grad = torch.ones_like(p)
    train_step(optimizer)
    with capture.record():
        train_step(optimizer)
    before = snapshot(optimizer)
    good = params[1].grad
    assert good is not None
    good[3] = float("inf")
    capture.replay()
    capture.replay()
    assert optimizer.skipped_steps == 2
    assert_same(before, snapshot(optimizer))
    good[3] = 1.0
    capture.replay()
    assert optimizer.skipped_steps == 2 and int(optimizer.state[params[0]]["step"]) == 2


# ---- late reports ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("in_step", [False, True], ids=["train and step", "sample_in_step"])
def test_a_report_that_comes_late(
    target: Target, monkeypatch: pytest.MonkeyPatch, in_step: bool, capturable: bool
) -> None:
    """The device is behind: the error comes from a later step(), and nothing of the bad one is in the state."""
    expected, others = fresh(target, capturable=capturable)
    train(expected, others, 3)
    optimizer, params = fresh(target, capturable=capturable, sample_in_step=in_step)
    train_modes(optimizer, params, 2)
    before = snapshot(optimizer)

    new_report = DeviceFlags.new_report
    arrived: list[bool] = []
    monkeypatch.setattr(DeviceFlags, "new_report", lambda control: new_report(control) if arrived else None)
    optimizer.train()
    drawn = flat(params)
    bowl(params, 2).backward()
    assert params[1].grad is not None
    params[1].grad[2] = float("nan")
    optimizer.step()  # the host does not know yet
    optimizer.zero_grad()
    optimizer.train()
    assert torch.equal(flat(params), drawn), "the sample of the step that was not taken"
    bowl(params, 2).backward()
    arrived.append(True)
    with pytest.raises(NonFiniteGradientError, match=r"param_groups\[0\]\['params'\]\[1\] of shape \(5,\)"):
        optimizer.step()
    assert_same(before, snapshot(optimizer))
    with pytest.raises(RuntimeError, match="without a sample"):
        optimizer.step()
    train(optimizer, params, 1, start=2)
    assert_same(snapshot(expected), snapshot(optimizer))


def test_a_late_report_after_good_steps(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps in between were taken; the one in which the report arrives was not."""
    expected, others = fresh(target)
    train(expected, others, 3)
    optimizer, params = fresh(target)
    new_report = DeviceFlags.new_report
    arrived: list[bool] = []
    monkeypatch.setattr(DeviceFlags, "new_report", lambda control: new_report(control) if arrived else None)
    optimizer.train()
    for p in params:
        p.grad = torch.full_like(p, float("inf"))
    optimizer.step()
    optimizer.zero_grad()
    train(optimizer, params, 3)
    assert_same(snapshot(expected), snapshot(optimizer))
    arrived.append(True)
    with pytest.raises(NonFiniteGradientError, match="did not take that step"):
        train(optimizer, params, 1, start=3)
    assert_same(snapshot(expected), snapshot(optimizer))
    assert optimizer.skipped_steps == 0
