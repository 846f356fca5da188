"""What trainers that select an optimizer by name or path do to it, as their sources have it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels import IVON
from ivon_kernels.integrations.transformers import IVONFactory
from tests.support.tiny_llm import IVON_OPTIONS

ROOT = Path(__file__).parents[2]
X, Y = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(1)), torch.ones(4, 6, 2)


def by_path(path: str) -> Any:
    """As sd-scripts and torchtune find it."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def loss_of(model: nn.Linear, step: int, rows: slice = slice(None)) -> Tensor:
    return nn.functional.mse_loss(model(X[step][rows]), Y[step][rows])


def plain_loop() -> list[Tensor]:
    """The weights after four steps of the loop that the README has."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = IVON(model.parameters(), **IVON_OPTIONS)
    for step in range(4):
        optimizer.train()
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in model.parameters()]


def test_the_loop_of_sd_scripts() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = by_path("ivon_kernels.integrations.by_name.ivon_schedulefree")(model.parameters(), **IVON_OPTIONS)
    optimizer.train()
    for step in range(4):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:  # a checkpoint
            assert optimizer.holds_sample
            optimizer.eval()
            assert not optimizer.holds_sample
            optimizer.train()
    optimizer.eval()
    assert all(map(torch.equal, model.parameters(), plain_loop()))


def test_the_closure_of_composer() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = IVON(model.parameters(), **IVON_OPTIONS)

    def microbatches(step: int) -> float:
        optimizer.zero_grad()  # in there, so that the last step's gradients are there when step() is called
        total = 0.0
        for rows in (slice(0, 3), slice(3, 6)):
            loss = loss_of(model, step, rows) / 2
            loss.backward()
            total += loss.item()
        return total

    for step in range(4):
        assert isinstance(optimizer.step(closure=lambda step=step, **_: microbatches(step)), float)
    # A gradient of two halves is rounded once more than that of the whole: some 2^-24 of sums of size 1 to 4, in four
    # steps, each of which divides it by hess + weight_decay, at least 0.51.
    for param, expected in zip(model.parameters(), plain_loop(), strict=True):
        torch.testing.assert_close(param.detach(), expected, rtol=0, atol=4 * 4 * 2**-24 / 0.51)


def test_the_entry_point_of_llm_foundry() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (found,) = re.findall(r'^\[project\.entry-points\.llmfoundry_optimizers\]\nivon = "(.+):(.+)"$', text, re.MULTILINE)
    assert by_path(".".join(found)) is IVON


def test_a_factory_takes_axolotls_arguments() -> None:
    made = [IVONFactory()(nn.Linear(3, 2), *extra, **IVON_OPTIONS) for extra in ((), (object(),))]
    assert made[0].param_groups[0]["lr"] == made[1].param_groups[0]["lr"] == IVON_OPTIONS["lr"]
    with pytest.raises(TypeError, match="args"):
        IVONFactory()(nn.Linear(3, 2), args=None, **IVON_OPTIONS)
