"""HeavyBall: AdamW in functions that it compiles, with epsilon in another place than torch's.

On the CPU its compilation takes more than a minute for 128 tensors, so it runs uncompiled there.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from benchmarks.speed.contenders import ADAMW_ARGS, Contender, Parameters, Step
from benchmarks.speed.verify import similar


def contenders(device: torch.device) -> list[Contender]:
    """Its AdamW, compiled where there is a GPU."""
    compiled = device.type == "cuda"

    def build(params: Parameters) -> Step:
        heavyball: Any = import_module("heavyball")
        if not compiled:
            heavyball.utils.compile_mode = None
        optimizer = heavyball.AdamW(params, **ADAMW_ARGS)
        grads = [param.grad for param in params]

        def step() -> None:
            for param, grad in zip(params, grads, strict=True):  # it takes them away
                param.grad = grad
            optimizer.step()

        return Step(step, optimizer=optimizer)

    name = f"HeavyBall AdamW{'' if compiled else ' (not compiled)'}"
    return [
        Contender(name, build, ("adamw",), package="heavyball", like_adamw=similar, compiles=compiled),
    ]
