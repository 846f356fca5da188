"""Parameters that share memory are refused by name; those that only lie beside or between each other are fine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ivon_kernels import IVON

OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 100.0, "seed": 1}
BASE = torch.randn(6, 8)


def named(*tensors: torch.Tensor) -> list[tuple[str, nn.Parameter]]:
    return [(f"layer{i}.weight", nn.Parameter(tensor)) for i, tensor in enumerate(tensors)]


@pytest.mark.parametrize(
    "tensors",
    [
        (BASE, BASE),
        (BASE, BASE.t()),
        (BASE, BASE[2:4]),
        (BASE[:4], BASE[3:]),
        (BASE[:, :5], BASE[:, 4:]),
        (BASE[::2], BASE[:, ::2]),
        (BASE, BASE.view(-1)[7:9]),
        (BASE[:, 1], torch.zeros(3), BASE[2]),
        (BASE.view(torch.bfloat16), BASE),
    ],
)
def test_two_in_one_place_are_refused_by_name(tensors: tuple[torch.Tensor, ...], backend: str) -> None:
    with pytest.raises(ValueError, match=r"layer\d\.weight and layer\d\.weight share memory"):
        IVON(named(*tensors), **OPTIONS, backend=backend)


@pytest.mark.parametrize(
    "tensors",
    [
        (BASE[:3], BASE[3:]),
        (BASE[:, :4], BASE[:, 4:]),
        (BASE[::2], BASE[1::2]),
        (BASE.t()[:4], BASE.t()[4:]),
        (BASE.view(-1)[:5], BASE.view(-1)[5:6], BASE.view(-1)[6:]),
        (torch.zeros(0), BASE, torch.zeros(0)),
    ],
)
def test_slices_that_do_not_overlap_train_as_copies_do(tensors: tuple[torch.Tensor, ...]) -> None:
    found = []
    for params in ([t.clone() for t in tensors], tensors):
        names = named(*params)
        start = [p.detach().clone() for _, p in names]
        optimizer = IVON(names, **OPTIONS)
        optimizer.train()
        for _, p in names:
            p.grad = torch.ones_like(p)
        optimizer.step()
        found.append([p.detach().clone() for _, p in names])
        for (_, p), value in zip(names, start, strict=True):
            p.data.copy_(value)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_one_parameters_own_elements() -> None:
    windows = torch.arange(10.0).unfold(0, 4, 1)
    with pytest.raises(ValueError, match=r"layer0\.weight has elements that share memory"):
        IVON(named(windows), **OPTIONS)


def test_across_groups_and_in_a_group_that_is_added() -> None:
    (a, one), (b, two) = named(BASE, BASE)
    with pytest.raises(ValueError, match="share memory"):
        IVON([{"params": [one]}, {"params": [two]}], **OPTIONS)
    optimizer = IVON([(a, one)], **OPTIONS)
    with pytest.raises(ValueError, match=rf"{a} and {b} share memory"):
        optimizer.add_param_group({"params": [(b, two)]})
    assert len(optimizer.param_groups) == 1


def test_a_frozen_one_is_fine_until_it_is_thawed() -> None:
    (_, one), (_, two) = names = named(BASE.clone(), torch.zeros(6, 8))
    two.data = one.data
    two.requires_grad_(False)
    optimizer = IVON(names, **OPTIONS)
    optimizer.train()
    optimizer.eval()
    two.requires_grad_(True)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.train()


def test_memory_that_became_shared_later() -> None:
    (_, one), (_, two) = names = named(BASE.clone(), torch.zeros(6, 8))
    optimizer = IVON(names, **OPTIONS)
    two.data = one.data
    with pytest.raises(ValueError, match="share memory"):
        optimizer.train()


def test_one_parameter_in_two_modules_is_one() -> None:
    embedding = nn.Embedding(6, 8)
    head = nn.Linear(8, 6, bias=False)
    head.weight = embedding.weight
    net = nn.ModuleList([embedding, head])
    assert len(IVON(net.named_parameters(), **OPTIONS).state) == 1
