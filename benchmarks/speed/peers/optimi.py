"""optimi: AdamW with Kahan summation for 16-bit weights, and Triton kernels on a GPU."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from benchmarks.speed.contenders import ADAMW_ARGS, Contender, Parameters, Step
from benchmarks.speed.verify import rounding


def contenders(device: torch.device) -> list[Contender]:
    """Its AdamW, in Triton where there is a GPU."""
    triton = device.type == "cuda"

    def build(params: Parameters) -> Step:
        optimi: Any = import_module("optimi")
        optimizer = optimi.AdamW(params, **ADAMW_ARGS, triton=triton)
        return Step(optimizer.step, optimizer=optimizer)

    name = f"optimi AdamW{' (triton)' if triton else ''}"
    return [Contender(name, build, ("adamw", "kahan"), package="torch-optimi", like_adamw=rounding)]
