"""State dicts go by name, groups keep what others put there; optimizers without a seed draw their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ivon_kernels import IVON

OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 100.0, "seed": 1}
NAMES = ["q.weight", "v.weight", "o.weight"]


def build(*groups: list[str], prefix: str = "", **options: Any) -> tuple[nn.ModuleDict, IVON]:
    torch.manual_seed(len(groups))
    net = nn.ModuleDict({name[0]: nn.Linear(6, 6, bias=False) for name in NAMES})
    known = dict(net.named_parameters())
    settings = [{"params": [(prefix + name, known[name]) for name in group]} for group in groups]
    return net, IVON(settings, **{**OPTIONS, **options})


def step(net: nn.ModuleDict, optimizer: IVON) -> None:
    optimizer.train()
    sum(layer(torch.ones(2, 6)).square().mean() for layer in net.values()).backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(*groups: list[str], **options: Any) -> tuple[nn.ModuleDict, IVON]:
    net, optimizer = build(*groups, **options)
    step(net, optimizer)
    return net, optimizer


@pytest.mark.parametrize(
    "groups", [[NAMES[::-1]], [NAMES[1:] + NAMES[:1]], [NAMES[:1], NAMES[1:]], [NAMES[2:], NAMES[:1], NAMES[1:2]]]
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_state_goes_by_name(groups: list[list[str]], prefix: str) -> None:
    net, optimizer = trained(NAMES)
    other, second = build(*groups, prefix=prefix)
    second.load_state_dict(optimizer.state_dict())
    for name, param in net.named_parameters():
        twin = other.get_parameter(name)
        assert torch.equal(param, twin)
        for key in ("mean", "momentum", "hess", "step"):
            assert torch.equal(optimizer.state[param][key], second.state[twin][key])
    assert [g["param_names"] for g in second.param_groups] == [[prefix + name for name in group] for group in groups]


def test_settings_go_with_the_names() -> None:
    _, optimizer = trained(NAMES[:1], NAMES[1:])
    optimizer.param_groups[1]["lr"] = 0.7
    _, second = build(NAMES[1:], NAMES[:1])
    second.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in second.param_groups] == [0.7, 0.1]
    whole, third = build(NAMES)
    before = [p.detach().clone() for p in whole.parameters()]
    with pytest.raises(ValueError, match="were in groups with other settings"):
        third.load_state_dict(optimizer.state_dict())
    assert all(map(torch.equal, before, whole.parameters()))


def test_other_names_are_refused_before_anything_changed() -> None:
    _, optimizer = trained(NAMES[:2])
    net, second = trained(NAMES[1:])
    before = [p.detach().clone() for p in net.parameters()]
    state = {p: {k: v.clone() for k, v in entry.items()} for p, entry in second.state.items()}
    with pytest.raises(ValueError, match=r"it has q\.weight, which the optimizer lacks, and lacks o\.weight"):
        second.load_state_dict(optimizer.state_dict())
    assert all(map(torch.equal, before, net.parameters()))
    assert all(torch.equal(v, second.state[p][k]) for p, entry in state.items() for k, v in entry.items())


def test_without_names_on_a_side_state_goes_by_position() -> None:
    net, optimizer = trained(NAMES)
    other = nn.ModuleDict({name[0]: nn.Linear(6, 6, bias=False) for name in NAMES})
    second = IVON(other.parameters(), **OPTIONS)
    second.load_state_dict(optimizer.state_dict())
    assert all(map(torch.equal, net.parameters(), other.parameters()))


def test_what_others_keep_in_the_groups_stays() -> None:
    _, optimizer = trained(NAMES)
    _, second = build(NAMES)
    torch.optim.lr_scheduler.LinearLR(second, 1.0, 0.1, 4)  # adds initial_lr
    second.param_groups[0].update(name="attention", lr_scale=0.5)
    second.load_state_dict(optimizer.state_dict())
    group = second.param_groups[0]
    assert (group["initial_lr"], group["name"], group["lr_scale"], group["lr"]) == (0.1, "attention", 0.5, 0.1)


def test_a_state_dict_of_another_optimizer_is_still_refused() -> None:
    net, _ = trained(NAMES)
    adam = torch.optim.AdamW(net.named_parameters())
    _, second = build(NAMES)
    with pytest.raises(ValueError, match="saved by another optimizer"):
        second.load_state_dict(adam.state_dict())


def test_optimizers_without_a_seed_draw_independent_noise() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        params = [nn.Parameter(torch.zeros(5000)) for _ in range(3)]
        optimizers = [IVON([p], lr=0.0, ess=1.0) for p in params]
        for optimizer in optimizers:
            optimizer.train()
        found.append(torch.stack([p.detach().clone() for p in params]))
    assert torch.equal(*found)  # a run that is repeated is the same run
    correlation = torch.corrcoef(found[0]) - torch.eye(3)
    assert correlation.abs().max() < 5 / 5000**0.5  # five standard errors


@pytest.mark.parametrize("one", [np.int64(1), np.uint8(1), torch.tensor(1)])
def test_whole_numbers_of_other_kinds(one: Any) -> None:
    net, optimizer = build(NAMES, seed=one, mc_samples=one)
    same, plain = build(NAMES)
    assert type(optimizer.seed) is int and type(optimizer.param_groups[0]["mc_samples"]) is int
    for model, opt, sample in ((net, optimizer, one), (same, plain, 1)):
        opt.train(sample=sample)
        opt.eval()
        opt.discard_samples()
        with opt.sampled_params(sample=sample):
            model.held = model["q"].weight.detach().clone()
    assert torch.equal(net.held, same.held)


@pytest.mark.parametrize("wrong", [1.5, "1", None, np.float32(1), torch.tensor([1, 2]), -1])
def test_what_is_no_whole_number_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"mc_samples must be a whole number in \[1, 65537\)"):
        build(NAMES, mc_samples=wrong)


@pytest.mark.parametrize("number", range(20))
def test_a_write_into_any_of_twenty_sampled_tensors_is_noticed(number: int) -> None:
    params = [nn.Parameter(torch.zeros(3)) for _ in range(20)]
    optimizer = IVON(params, **OPTIONS)
    optimizer.train()
    with torch.no_grad():
        params[number].add_(1)
    with pytest.raises(RuntimeError, match="were written while they held a sample"):
        optimizer.step()
