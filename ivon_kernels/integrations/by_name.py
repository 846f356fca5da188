"""IVON for trainers that are told an optimizer by its dotted path and call it as they call schedule-free ones."""

from __future__ import annotations

from typing import Any

from ivon_kernels.optimizer import IVON

__all__ = ["ivon_schedulefree"]


def ivon_schedulefree(params: Any, lr: float, ess: float, **options: Any) -> IVON:
    """IVON as schedule-free optimizers are used: ``train()`` once, ``eval()`` and ``train()`` around an evaluation.

    That is ``IVON(..., sample_in_step=True)``: each step writes the next sample itself. kohya's sd-scripts make these
    calls of an optimizer whose path ends with "schedulefree", also around a save.

    Args:
        params: As of :class:`IVON`.
        lr: As there.
        ess: As there.
        **options: Further arguments of :class:`IVON`.
    """
    return IVON(params, lr, ess, **{"sample_in_step": True, **options})
