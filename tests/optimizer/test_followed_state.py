"""``optimizer.state`` is the state: what is written into it is what the kernels, state dict and posterior see."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ivon_kernels import IVON

OPTIONS: dict[str, Any] = {"lr": 0.5, "ess": 100.0, "seed": 1}


def build(backend: str | None = None) -> tuple[nn.Linear, IVON]:
    torch.manual_seed(0)
    net = nn.Linear(8, 8)
    optimizer = IVON(net.parameters(), **OPTIONS, backend=backend)
    step(net, optimizer)
    return net, optimizer


def step(net: nn.Module, optimizer: IVON) -> None:
    optimizer.train()
    net(torch.ones(4, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def clones(optimizer: IVON) -> None:
    for entry in optimizer.state.values():
        for key, value in entry.items():
            entry[key] = value.clone()


def doubles(optimizer: IVON) -> None:
    for entry in optimizer.state.values():
        entry.update({key: value.double() for key, value in entry.items() if key != "step"})


def numbers(optimizer: IVON) -> None:
    for entry in optimizer.state.values():
        entry["step"] = int(entry["step"])


def entries(optimizer: IVON) -> None:
    for param in list(optimizer.state):
        optimizer.state[param] = {key: value.clone() for key, value in optimizer.state[param].items()}


def plain(optimizer: IVON) -> None:
    optimizer.state = {param: dict(entry) for param, entry in optimizer.state.items()}  # type: ignore[assignment]


def tree(optimizer: IVON) -> None:
    optimizer.state = tree_map(lambda value: value.clone(), optimizer.state)


def deep(optimizer: IVON) -> None:
    copied = copy.deepcopy(dict(optimizer.state.items()))
    optimizer.state.update(dict(zip(optimizer.state, copied.values(), strict=True)))


def merged(optimizer: IVON) -> None:
    optimizer.state |= {param: {**entry} for param, entry in optimizer.state.items()}


HANDLINGS = [clones, doubles, numbers, entries, plain, tree, deep, merged]


def consistent(net: nn.Linear, optimizer: IVON) -> None:
    """Kernels' numbers are those of the state, state dict and posterior."""
    packed, posterior = optimizer.state_dict()["state"], optimizer.posterior(net)
    for i, (name, param) in enumerate(net.named_parameters()):
        mean = optimizer.mean_of(param)
        assert torch.equal(packed[i]["mean"], mean) and torch.equal(posterior[name].mean, mean)
        for key, value in optimizer.state[param].items():
            assert torch.equal(packed[i][key], value)
        assert type(packed[i]) is dict


@pytest.mark.parametrize("handle", HANDLINGS)
def test_equal_values_change_nothing(handle: Callable[[IVON], None], backend: str) -> None:
    (net, optimizer), (other, untouched) = build(backend), build(backend)
    handle(optimizer)
    for i in range(4):
        if i == 2:  # in the middle of a step too
            optimizer.train()
            handle(optimizer)
        step(net, optimizer)
        step(other, untouched)
    optimizer.eval()
    assert torch.equal(net.weight, other.weight) and torch.equal(net.bias, other.bias)
    assert int(optimizer.state_dict()["state"][0]["step"]) == 5
    consistent(net, optimizer)


@pytest.mark.parametrize("key", ["mean", "momentum", "hess", "step"])
@pytest.mark.parametrize("whole", [False, True])
def test_other_values_are_taken_over(key: str, whole: bool, backend: str) -> None:
    net, optimizer = build(backend)
    value = torch.tensor(7) if key == "step" else torch.full((8, 8), 0.25)
    if whole:
        optimizer.state[net.weight] = {**optimizer.state[net.weight], key: value}
    else:
        optimizer.state[net.weight][key] = value
    assert torch.equal(optimizer.state_dict()["state"][0][key], value)
    consistent(net, optimizer)
    if key == "mean":
        assert torch.equal(net.weight, value)
    step(net, optimizer)
    assert int(optimizer.state[net.weight]["step"]) == (8 if key == "step" else 2)
    optimizer.eval()
    consistent(net, optimizer)


def clear(optimizer: IVON) -> None:
    optimizer.state.clear()


def clear_entries(optimizer: IVON) -> None:
    for entry in optimizer.state.values():
        entry.clear()


def pop(optimizer: IVON) -> None:
    for param in list(optimizer.state):
        optimizer.state.pop(param)


def delete(optimizer: IVON) -> None:
    for param in list(optimizer.state):
        del optimizer.state[param]


def replace(optimizer: IVON) -> None:
    optimizer.state = {}  # type: ignore[assignment]


@pytest.mark.parametrize("how", [clear, clear_entries, pop, delete, replace])
def test_what_is_gone_starts_anew_from_the_mean(how: Callable[[IVON], None], backend: str) -> None:
    net, optimizer = build(backend)
    weight = net.weight.detach().clone()
    how(optimizer)
    packed = optimizer.state_dict()["state"]
    assert [int(entry["step"]) for entry in packed.values()] == [0, 0]
    assert torch.equal(packed[0]["mean"], weight) and (packed[0]["hess"] == 1).all()
    step(net, optimizer)
    assert int(optimizer.state[net.weight]["step"]) == 1
    consistent(net, optimizer)


def wrong_shape(entry: dict[str, Any]) -> None:
    entry["hess"] = torch.ones(3)


def lacking(entry: dict[str, Any]) -> None:
    del entry["momentum"]


def no_tensor(entry: dict[str, Any]) -> None:
    entry["mean"] = None


def no_step(entry: dict[str, Any]) -> None:
    entry["step"] = -1


@pytest.mark.parametrize("spoil", [wrong_shape, lacking, no_tensor, no_step])
def test_what_does_not_fit_is_refused_by_name(spoil: Callable[[dict[str, Any]], None]) -> None:
    net, optimizer = build()
    kept = {param: dict(entry) for param, entry in optimizer.state.items()}
    spoil(optimizer.state[net.weight])
    for call in (optimizer.train, optimizer.state_dict, lambda: optimizer.posterior(net)):
        with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[0\]"):
            call()
    optimizer.state.update(kept)
    step(net, optimizer)
    assert int(optimizer.state[net.weight]["step"]) == 2


def test_other_values_in_the_middle_of_a_step_are_refused() -> None:
    net, optimizer = build()
    hess = optimizer.state[net.weight]["hess"]
    optimizer.train()
    optimizer.state[net.weight]["hess"] = hess * 2
    net(torch.ones(4, 8)).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"changed between the sample and step\(\)"):
        optimizer.step()
    optimizer.discard_samples()
    step(net, optimizer)
    optimizer.eval()
    consistent(net, optimizer)


def test_what_users_keep_there_stays() -> None:
    net, optimizer = build()
    optimizer.state[net.weight]["note"] = "mine"
    step(net, optimizer)
    assert optimizer.state_dict()["state"][0]["note"] == "mine"
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[net.weight]["note"] == "mine"


def test_looking_up_what_has_no_state_does_no_harm() -> None:
    net, optimizer = build()
    assert not optimizer.state[torch.zeros(1)]
    step(net, optimizer)
    assert len(optimizer.state_dict()["state"]) == 2


def test_state_given_to_a_frozen_parameter_is_there_when_it_thaws() -> None:
    net = nn.Linear(8, 8)
    net.bias.requires_grad_(False)
    optimizer = IVON(net.parameters(), **OPTIONS)
    given: dict[str, Tensor] = {key: torch.full((8,), 0.5) for key in ("mean", "momentum", "hess")}
    optimizer.state[net.bias] = {**given, "step": 3}
    step(net, optimizer)
    assert int(optimizer.state[net.bias]["step"]) == 3
    net.bias.requires_grad_(True)
    step(net, optimizer)
    assert int(optimizer.state[net.bias]["step"]) == 4


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_of_the_state_are_plain(copied: Callable[[Any], Any]) -> None:
    net, optimizer = build()
    entry = copied(optimizer.state[net.weight])
    assert type(entry) is dict
    entry.clear()
    step(net, optimizer)
    assert int(optimizer.state[net.weight]["step"]) == 2
