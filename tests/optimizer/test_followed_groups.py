"""Parameters that are replaced, appended or taken out, and whole groups, are followed as torch's optimizers do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels import IVON

OPTIONS: dict[str, Any] = {"lr": 1.0, "ess": 100.0, "hess_init": 0.1, "seed": 1}


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


def step(optimizer: IVON) -> None:
    optimizer.train()
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = p.detach().clone() if p.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()


def in_place(group: dict[str, Any], params: list[Tensor]) -> None:
    group["params"][:] = params


def one_by_one(group: dict[str, Any], params: list[Tensor]) -> None:
    for i, param in enumerate(params[: len(group["params"])]):
        group["params"][i] = param
    del group["params"][len(params) :]
    group["params"].extend(params[len(group["params"]) :])


def out_of_place(group: dict[str, Any], params: list[Tensor]) -> None:
    group["params"] = list(params)


WAYS = pytest.mark.parametrize("put", [in_place, one_by_one, out_of_place])
Put = Callable[[dict[str, Any], list[Tensor]], None]


@WAYS
@pytest.mark.parametrize("shape", [(4,), (6,), ()])
@pytest.mark.parametrize("popped", [True, False])
def test_a_replaced_parameter_starts_anew(put: Put, shape: tuple[int, ...], popped: bool, backend: str) -> None:
    a, b = parameter(4), parameter(4)
    optimizer = IVON([a, b], **OPTIONS, backend=backend)
    step(optimizer)
    if popped:
        optimizer.state.pop(b)
    new, old = parameter(*shape), b.detach().clone()
    put(optimizer.param_groups[0], [a, new])
    for _ in range(3):
        step(optimizer)
    assert b not in optimizer.state and torch.equal(b, old)
    assert (new < 1).all() and int(optimizer.state[new]["step"]) == 3
    assert int(optimizer.state[a]["step"]) == 4
    assert list(optimizer.state_dict()["state"]) == [0, 1]


@WAYS
def test_appended_and_taken_out(put: Put, backend: str) -> None:
    a, b, c = parameter(4), parameter(3), parameter(2)
    optimizer = IVON([a, b], **OPTIONS, backend=backend)
    step(optimizer)
    put(optimizer.param_groups[0], [a, b, c])
    step(optimizer)
    assert [int(optimizer.state[p]["step"]) for p in (a, b, c)] == [2, 2, 1]
    put(optimizer.param_groups[0], [c, a])
    step(optimizer)
    assert [int(optimizer.state[p]["step"]) for p in (a, c)] == [3, 2] and len(optimizer.state) == 2
    put(optimizer.param_groups[0], [b, c, a])  # starts anew
    step(optimizer)
    assert [int(optimizer.state[p]["step"]) for p in (a, b, c)] == [4, 1, 3]


def test_state_goes_with_its_parameter_and_not_by_position() -> None:
    a, b = parameter(4), parameter(4)
    optimizer = IVON([{"params": [a]}, {"params": [b], "lr": 0.0}], **OPTIONS)
    step(optimizer)
    momentum = optimizer.state[a]["momentum"].clone()
    first, second = optimizer.param_groups
    first["params"], second["params"] = second["params"], first["params"]
    optimizer.state_dict()
    assert torch.equal(optimizer.state[a]["momentum"], momentum)
    before = a.detach().clone(), b.detach().clone()
    step(optimizer)
    assert torch.equal(a, before[0]) and not torch.equal(b, before[1])  # the learning rates of their groups now


def test_a_parameter_taken_out_in_the_middle_of_a_step_gets_its_mean_back(backend: str) -> None:
    a, b = parameter(4), parameter(4)
    optimizer = IVON([a, b], **OPTIONS, backend=backend)
    step(optimizer)
    mean = b.detach().clone()
    optimizer.train()
    assert not torch.equal(b, mean)
    a.grad, b.grad = torch.ones(4), torch.ones(4)
    new = parameter(5)
    optimizer.param_groups[0]["params"][1] = new
    optimizer.step()
    assert torch.equal(b, mean) and b not in optimizer.state
    assert int(optimizer.state[a]["step"]) == 2 and int(optimizer.state[new]["step"]) == 0
    a.grad = b.grad = None
    step(optimizer)
    assert int(optimizer.state[new]["step"]) == 1


def test_one_appended_in_the_middle_of_a_step_joins_when_train_is_called_again(backend: str) -> None:
    a, b = parameter(4), parameter(4)
    optimizer = IVON([a], **OPTIONS, backend=backend)
    optimizer.train()
    sample = a.detach().clone()
    optimizer.param_groups[0]["params"].append(b)
    optimizer.train()
    assert torch.equal(a, sample) and not torch.equal(b, torch.ones(4))
    a.grad, b.grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in (a, b)] == [1, 1]
    step(optimizer)
    optimizer.eval()


def test_whole_groups_are_others() -> None:
    a, b = parameter(4), parameter(3)
    optimizer = IVON([a], **OPTIONS)
    step(optimizer)
    defaults = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    optimizer.param_groups = [{**defaults, "params": [b], "lr": 0.5}, {**defaults, "params": [a]}]
    step(optimizer)
    assert [int(optimizer.state[p]["step"]) for p in (a, b)] == [2, 1]
    optimizer.param_groups.pop()
    step(optimizer)
    assert a not in optimizer.state and int(optimizer.state[b]["step"]) == 2


def test_what_cannot_be_trained_is_refused_and_nothing_changed() -> None:
    a, b = parameter(4), parameter(4)
    optimizer = IVON([a, b], **OPTIONS)
    step(optimizer)
    for wrong, match in (
        ([a, nn.Parameter(torch.zeros(2, dtype=torch.complex64))], "dtype"),
        ([a, a], "more than once"),
        ([a, b, nn.Parameter(b.detach())], "share memory"),
    ):
        optimizer.param_groups[0]["params"] = wrong
        with pytest.raises((ValueError, TypeError), match=match):
            optimizer.train()
    optimizer.param_groups[0]["params"] = [a, b]
    step(optimizer)
    assert [int(optimizer.state[p]["step"]) for p in (a, b)] == [2, 2]


def test_the_same_run_whatever_way_the_parameters_came() -> None:
    """After a change the noise is that of an optimizer which was built so: the index is the position."""
    found = []
    for changed in (False, True):
        torch.manual_seed(0)
        a, b, c = (nn.Parameter(torch.randn(5)) for _ in range(3))
        optimizer = IVON([b, c] if changed else [a, b], **OPTIONS)
        if changed:
            optimizer.param_groups[0]["params"][:] = [a, b]
        step(optimizer)
        step(optimizer)
        found.append([a.detach(), b.detach()])
    assert all(map(torch.equal, *found))
