"""bitsandbytes: AdamW with moments of 8 bits (tensors below 4096 elements keep 32)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from benchmarks.speed.contenders import ADAMW_ARGS, Contender, Parameters, Step
from benchmarks.speed.verify import similar


def _build(params: Parameters) -> Step:
    bitsandbytes: Any = import_module("bitsandbytes")
    optimizer = bitsandbytes.optim.AdamW8bit(params, **ADAMW_ARGS)
    return Step(optimizer.step, optimizer=optimizer)


def contenders(device: torch.device) -> list[Contender]:
    """Its 8-bit AdamW."""
    moved = ("adamw, 8-bit moments",)
    return [Contender("bitsandbytes AdamW8bit", _build, moved, package="bitsandbytes", like_adamw=similar)]
