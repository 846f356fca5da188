"""LoRA+ of PEFT makes groups without weight decay: IVON says so, and takes the one that it is given."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from ivon_kernels import IVON
from tests.support.tiny_llm import lora_llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def loraplus(**options: Any) -> IVON:
    made = create_loraplus_optimizer(lora_llama(), IVON, lr=0.1, loraplus_lr_ratio=4, ess=100.0, **options)
    assert isinstance(made, IVON)
    return made


def test_loraplus_without_weight_decay_is_said() -> None:
    with pytest.warns(UserWarning, match=r"every parameter group has weight_decay=0, .* weight_decay=0.0001.*loraplus"):
        made = loraplus()
    assert {group["weight_decay"] for group in made.param_groups} == {0.0}


def test_loraplus_with_its_weight_decay_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="every parameter group")
        made = loraplus(loraplus_weight_decay=1e-4)
        loraplus(weight_decay=0.0)
    used = [group for group in made.param_groups if group["params"]]
    assert {(group["lr"], group["weight_decay"]) for group in used} == {(0.1, 1e-4), (0.4, 1e-4)}


def test_only_groups_without_any_are_worth_a_word() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IVON([{"params": a.parameters(), "weight_decay": 0.0}, {"params": b.parameters()}], lr=0.1, ess=10.0)
        IVON([{"params": [], "weight_decay": 1.0}, {"params": a.parameters()}], lr=0.1, ess=10.0)
        IVON([{"params": a.parameters(), "weight_decay": 0}], lr=0.1, ess=10.0)  # written by hand
    groups = [{"params": net.parameters(), "weight_decay": 0} for net in (a, b)]
    with pytest.warns(UserWarning, match=r"every parameter group"):
        IVON([*groups, {"params": [], "weight_decay": 1.0}], lr=0.1, ess=10.0)
