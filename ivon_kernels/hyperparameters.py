"""Hyperparameters: what is allowed, and the scalars of a step computed from them once, on the host, in double."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from torch import Tensor

from ivon_kernels.backends.base import StepScalars

GROUP_KEYS = (
    "lr",
    "ess",
    "hess_init",
    "beta1",
    "beta2",
    "weight_decay",
    "hess_approx",
    "clip_radius",
    "debias",
    "rescale_lr",
)
"""What a parameter group may override."""

OPTIMIZER_KEYS = ("mc_samples", "sync", "seed")
"""What belongs to the whole optimizer: kept in every group so that state dicts carry it."""

HESS_APPROXIMATIONS = ("price", "gradsq")

_HESS_MARGIN = 2.0**-20  # hess + weight_decay never falls below this fraction of weight_decay ...
_HESS_TINY = 1e-30  # ... nor below this
_PRECISION_MAX = 2.0**126  # ess * hess never exceeds this, whatever finite gradients come

_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("a finite number >= 0", lambda v: 0 <= v < math.inf),
    "ess": ("a finite number > 0", lambda v: 0 < v < math.inf),
    "hess_init": ("a finite number > 0", lambda v: 0 < v < math.inf),
    "beta1": ("in [0, 1)", lambda v: 0 <= v < 1),
    "beta2": ("in [0, 1)", lambda v: 0 <= v < 1),
    "weight_decay": ("a finite number >= 0", lambda v: 0 <= v < math.inf),
    "clip_radius": ("> 0 (inf: no clipping)", lambda v: v > 0),
}


def validate(group: dict[str, Any], where: str) -> None:
    """Check the hyperparameters of one parameter group.

    Raises:
        ValueError: Naming the hyperparameter, its value, what is allowed, and `where` it stands.
        TypeError: If a number is something else.
    """
    for key, (allowed, holds) in _RANGES.items():
        value = group[key]
        if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.numel() == 1):
            raise TypeError(f"{key} must be a number, got {value!r} in {where}")
        if not holds(float(value)):
            raise ValueError(f"{key} must be {allowed}, got {group[key]} in {where}")
    if group["hess_approx"] not in HESS_APPROXIMATIONS:
        raise ValueError(f"hess_approx must be one of {HESS_APPROXIMATIONS}, got {group['hess_approx']!r} in {where}")


def step_scalars(group: dict[str, Any], step: int, amp_scale: float, samples: int) -> StepScalars:
    """The scalars of a parameter's next update.

    Args:
        group: Its parameter group.
        step: Its finished updates; the bias correction is that of update ``step + 1``.
        amp_scale: The loss scale that its gradients still carry.
        samples: MC samples that the sums hold.
    """
    weight_decay = float(group["weight_decay"])
    beta1, beta2 = float(group["beta1"]), float(group["beta2"])
    gradsq = group["hess_approx"] == "gradsq"
    lr = float(group["lr"])
    if group["rescale_lr"]:
        lr *= float(group["hess_init"]) + weight_decay
    return StepScalars(
        ess=float(group["ess"]),
        weight_decay=weight_decay,
        beta1=beta1,
        one_minus_beta1=1.0 - beta1,
        one_minus_beta2=1.0 - beta2,
        inv_debias=1.0 / (1.0 - beta1 ** (step + 1)) if group["debias"] else 1.0,
        lr=lr,
        clip_radius=float(group["clip_radius"]),
        hess_floor=max(-weight_decay * (1.0 - _HESS_MARGIN), _HESS_TINY - weight_decay),
        hess_ceiling=_PRECISION_MAX / max(float(group["ess"]), 1.0),
        grad_scale=1.0 / (amp_scale * samples),
        second_scale=1.0 / ((amp_scale**2 if gradsq else amp_scale) * samples),
        gradsq=float(gradsq),
    )
