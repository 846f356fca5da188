"""torch.optim's own promises: hooks, groups added later, and parameters whose storage moves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ivon_kernels import IVON
from tests.support.helpers import (
    OPTIONS,
    assert_same,
    bowl,
    flat,
    parameters,
    put,
    relative_error,
    snapshot,
    state,
    through_file,
    train,
    two_groups,
)

STATE = {"step", "mean", "momentum", "hess"}


def test_hooks_of_torch_optim_run(backend: str) -> None:
    optimizer, params = two_groups(backend)
    calls: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    optimizer.register_step_pre_hook(note("step pre"))
    optimizer.register_step_post_hook(note("step post"))
    optimizer.register_state_dict_pre_hook(note("save pre"))
    optimizer.register_state_dict_post_hook(note("save post"))
    optimizer.register_load_state_dict_pre_hook(note("load pre"))
    optimizer.register_load_state_dict_post_hook(note("load post"))
    train(optimizer, params, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["step pre", "step post", "save pre", "save post", "load pre", "load post"]


def test_step_hooks_are_called_as_torch_calls_them() -> None:
    """The same calls, in the same order, with the same arguments as for AdamW; torch leaves our step as it is."""
    calls: list[tuple[object, ...]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda optimizer, args, kwargs: calls.append((name, len(args), sorted(kwargs)))

    def without_closure(_: Any, args: Any, kwargs: Any) -> Any:
        return args[:1], {}

    def made(kind: Any) -> list[tuple[object, ...]]:
        calls.clear()
        params = parameters(3)
        optimizer = kind(params)
        handles = [register_optimizer_step_pre_hook(note("all before")), register_optimizer_step_post_hook(note("all"))]
        optimizer.register_step_pre_hook(without_closure)
        optimizer.register_step_pre_hook(note("before"))
        optimizer.register_step_post_hook(note("after"))
        if isinstance(optimizer, IVON):
            optimizer.train()
        sum(p.sum() for p in params).backward()  # type: ignore[union-attr]
        optimizer.step(closure=lambda: pytest.fail("the hook has taken it out"))
        for handle in handles:
            handle.remove()
        return list(calls)

    assert made(lambda params: IVON(params, 0.1, 10.0)) == made(torch.optim.AdamW) != []
    assert IVON.step.__module__ == "ivon_kernels.optimizer"


def test_a_step_is_in_the_profile() -> None:
    optimizer, params = two_groups("reference")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, params, 2)
    (record,) = [event for event in profile.key_averages() if event.key == "Optimizer.step#IVON.step"]
    assert record.count == 2


def test_a_pre_hook_with_another_answer_is_refused() -> None:
    optimizer, params = two_groups("reference")
    optimizer.register_step_pre_hook(lambda *_: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(RuntimeError, match="must return None or a tuple of"):
        train(optimizer, params, 1)


def test_hooks_may_replace_the_dict(backend: str) -> None:
    optimizer, _ = two_groups(backend)
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "extra": 1})
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    other, _ = two_groups(backend, seed=9)

    def without_extra(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
        loaded = {k: v for k, v in loaded.items() if k != "extra"}
        loaded["param_groups"][0]["lr"] = 0.777
        return loaded

    other.register_load_state_dict_pre_hook(without_extra)
    other.load_state_dict(copy.deepcopy(saved))
    assert other.param_groups[0]["lr"] == 0.777


def test_a_step_pre_hook_sees_the_gradients_and_may_change_them(backend: str) -> None:
    optimizer, params = two_groups(backend)

    def halve(*_: Any) -> None:
        for p in params:
            assert p.grad is not None
            p.grad.mul_(0.5)

    optimizer.register_step_pre_hook(halve)
    optimizer.train()
    bowl(params, 0).backward()
    grads = [p.grad.clone() for p in params if p.grad is not None]
    optimizer.step()
    torch.testing.assert_close(optimizer.state[params[0]]["momentum"], 0.05 * grads[0])


@pytest.mark.parametrize("trained", [0, 3])
def test_add_param_group_equals_having_had_it(backend: str, trained: int) -> None:
    """The new group starts fresh; the old ones keep their state and their noise."""
    optimizer, params = two_groups(backend)
    train(optimizer, params, trained)
    before = snapshot(optimizer)
    extra = parameters(7, seed=3)[0]
    optimizer.add_param_group({"params": [extra], "ess": 10.0})
    after = snapshot(optimizer)
    assert_same(before, {key: after[key] for key in before})
    assert set(optimizer.state[extra]) == STATE and torch.equal(optimizer.state[extra]["hess"], torch.full((7,), 0.5))
    train(optimizer, [*params, extra], 2, start=trained)

    resumed, others = two_groups(backend)
    more = parameters(7, seed=3)[0]
    resumed.add_param_group({"params": [more], "ess": 10.0})
    train(resumed, others, trained)
    train(resumed, [*others, more], 2, start=trained)
    assert_same(snapshot(optimizer), snapshot(resumed))


def test_save_and_load_around_add_param_group(backend: str) -> None:
    optimizer, params = two_groups(backend)
    extra = parameters(7, seed=3)[0]
    optimizer.add_param_group({"params": [extra]})
    train(optimizer, [*params, extra], 3)
    saved = through_file(optimizer.state_dict())

    other, others = two_groups(backend, seed=9)
    more = parameters(7, seed=3)[0]
    with pytest.raises(ValueError, match="groups"):
        other.load_state_dict(saved)
    other.add_param_group({"params": [more]})
    put([*others, more], [*params, extra])
    other.load_state_dict(saved)
    assert_same(snapshot(optimizer), snapshot(other))
    last = nn.Parameter(torch.ones(2))
    other.add_param_group({"params": [last]})
    train(other, [*others, more, last], 1)


def test_add_param_group_refuses_what_the_constructor_refuses(backend: str) -> None:
    optimizer, params = two_groups(backend)
    before = snapshot(optimizer)
    for group, reason in (({"params": [params[0]]}, "more than one"), ({"params": parameters(2), "ess": 0.0}, "ess")):
        with pytest.raises(ValueError, match=reason):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 2
    assert_same(before, snapshot(optimizer))
    train(optimizer, params, 1)


# --- parameters that move --------------------------------------------------------------------------------------------


@pytest.mark.on_triton
def test_a_parameter_whose_storage_moved_is_followed(backend: str) -> None:
    """``p.data = ...`` (model.to, vmap tricks, quantizers): the new storage is used and its values are the mean."""
    expected, others = two_groups(backend)
    optimizer, params = two_groups(backend)
    for step in range(3):
        train(expected, others, 1, start=step)
        train(optimizer, params, 1, start=step)
        for p in params:
            p.data = p.data.clone()
    assert_same(snapshot(expected), snapshot(optimizer))


@pytest.mark.on_triton
def test_a_parameter_whose_strides_changed_in_place_is_followed(backend: str) -> None:
    """Another view of the same memory: neither the pointer nor contiguity tells, only the strides do."""
    values = parameters((4, 4, 4))[0].detach()
    expected = nn.Parameter(values.clone())
    moving = nn.Parameter(values.permute(1, 0, 2).contiguous().permute(1, 0, 2))
    optimizers = [IVON([p], backend=backend, seed=1, **OPTIONS) for p in (expected, moving)]
    train(optimizers[0], [expected], 3)
    train(optimizers[1], [moving], 1)
    mean = moving.detach().clone()
    moving.data = moving.data.permute(1, 0, 2).permute(2, 1, 0).copy_(mean)
    assert moving.stride() == (1, 4, 16)
    train(optimizers[1], [moving], 2, start=1)
    assert torch.equal(moving, expected)


@pytest.mark.on_triton
def test_a_parameter_set_to_new_data_starts_from_it(backend: str) -> None:
    optimizer, params = two_groups(backend)
    train(optimizer, params, 2)
    params[0].data = torch.full((4, 3), 7.0)
    with optimizer.sampled_params(train=True):
        assert (params[0] - 7).abs().max() < 3.0
        bowl(params, 2).backward()
    optimizer.step()
    assert (params[0] - 7).abs().max() < 3.0


@pytest.mark.on_triton
def test_a_parameter_that_changed_its_dtype(backend: str) -> None:
    optimizer, params = two_groups(backend)
    train(optimizer, params, 2)
    hess = state(optimizer, "hess")
    for p in params:
        p.data = p.data.bfloat16()
        p.grad = None
    train(optimizer, params, 2)
    assert all(p.dtype == torch.bfloat16 for p in params)
    assert state(optimizer, "hess").dtype == torch.float32 and not torch.equal(state(optimizer, "hess"), hess)
    assert relative_error(flat(params), torch.cat([optimizer.state[p]["mean"].flatten() for p in params])) < 2**-8


def test_a_move_between_samples_keeps_the_samples_before_it() -> None:
    """A dtype of another backend stands for another device here: both give the parameter new state."""
    trajectories = []
    for moved in (False, True):
        params = parameters(6, 4)
        optimizer = IVON(params, seed=3, **OPTIONS)
        optimizer.train()
        for p in params:
            p.grad = torch.full_like(p, 0.25)
        optimizer.next_sample()
        if moved:
            params[0].data = params[0].data.double()
            assert optimizer.state[params[0]]["mean"].dtype is torch.float32
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()
        trajectories.append([optimizer.state[p][key].float() for p in params for key in ("momentum", "hess")])
    for left, right in zip(*trajectories, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_a_model_that_moved_to_another_device() -> None:
    model = nn.Linear(3, 2)
    optimizer = IVON(model.parameters(), backend="reference", seed=0, **OPTIONS)
    train(optimizer, list(model.parameters()), 2)
    model.cuda()
    train(optimizer, list(model.parameters()), 2)
    assert all(t.is_cuda for p in model.parameters() for t in (p, optimizer.state[p]["hess"]))
