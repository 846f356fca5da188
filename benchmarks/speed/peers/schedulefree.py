"""schedulefree: AdamW without a learning-rate schedule. It interpolates weights, so its update is not AdamW's."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from benchmarks.speed.contenders import ADAMW_ARGS, Contender, Parameters, Step


def _build(params: Parameters) -> Step:
    schedulefree: Any = import_module("schedulefree")
    optimizer = schedulefree.AdamWScheduleFree(params, **ADAMW_ARGS)
    optimizer.train()
    return Step(optimizer.step, optimizer=optimizer)


def contenders(device: torch.device) -> list[Contender]:
    """Its AdamW, foreach as it is by default."""
    return [Contender("schedule-free AdamW", _build, ("adamw",), package="schedulefree")]
