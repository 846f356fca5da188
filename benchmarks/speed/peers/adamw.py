"""``torch.optim.AdamW`` in its three implementations, and its checkpoints."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.speed.contenders import ADAMW_ARGS, BASELINE, Contender, Parameters, Step, checkpoints
from benchmarks.speed.verify import rounding

_IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    BASELINE: {"fused": True},
    "AdamW (foreach)": {"foreach": True},
    "AdamW (loop)": {"foreach": False, "fused": False},
}


def _make(params: Parameters, **options: Any) -> tuple[torch.optim.AdamW, Step]:
    optimizer = torch.optim.AdamW(params, **ADAMW_ARGS, **options)
    return optimizer, Step(optimizer.step, optimizer=optimizer)


def contenders(device: torch.device) -> list[Contender]:
    """The three, and the fused one's checkpoints."""

    def build(options: dict[str, Any]) -> Any:
        return lambda params: _make(params, **options)[1]

    return [
        *(
            Contender(name, build(options), ("adamw",), like_adamw=rounding)
            for name, options in _IMPLEMENTATIONS.items()
        ),
        *checkpoints(BASELINE, lambda params: _make(params, fused=True)),
    ]
