"""Settings for LoRA: the published ones, and those that this project's studies found for runs of other lengths."""

from __future__ import annotations

import math
from typing import NamedTuple, SupportsFloat

PUBLISHED_LR = 0.03  # for 10,000 steps
PUBLISHED_ESS = 1e7
PUBLISHED_HESS = 1e-3
PUBLISHED_BETA2 = 0.99999
HESS, BETA2 = 0.04, 0.999  # what goes with a given sigma
TRAVEL = 0.045  # how far a weight should be able to go, at least
TRAVEL_IN_SIGMAS = 2.0


class LoraSettings(NamedTuple):
    """What :meth:`ivon_kernels.IVON.for_lora` works out."""

    lr: float
    ess: float
    hess_init: float
    beta2: float


def lora_settings(
    num_data: SupportsFloat,
    *,
    steps: SupportsFloat | None,
    sigma: SupportsFloat | None,
    lr: float | None,
    ess: float | None,
    hess_init: float | None,
    beta2: float | None,
    clip_radius: float,
) -> LoraSettings:
    """The settings of :meth:`ivon_kernels.IVON.for_lora`, whose arguments these are; what is None is worked out.

    Raises:
        ValueError: A number is out of range or no number, or `sigma` contradicts the others.
    """
    num_data = _number(num_data, "num_data", "at least 1", 1)
    steps = None if steps is None else _number(steps, "steps", "at least 1", 1)
    sigma = None if sigma is None else _number(sigma, "sigma", "positive", math.nextafter(0, 1))
    if lr is None:
        lr = PUBLISHED_LR if steps is None else max(PUBLISHED_LR, _rate(steps, sigma or 0.0, clip_radius))
    if sigma is None:
        return LoraSettings(
            lr,
            max(PUBLISHED_ESS, num_data) if ess is None else ess,
            PUBLISHED_HESS if hess_init is None else hess_init,
            PUBLISHED_BETA2 if beta2 is None else beta2,
        )
    precision = sigma**-2  # ess * hess_init
    if ess is not None and hess_init is not None:
        raise ValueError("of sigma, ess and hess_init two decide the third: leave one of them out")
    if hess_init is None:
        hess_init = precision / ess if ess is not None else min(HESS, precision / num_data)
    if ess is None:
        ess = precision / hess_init
        if ess < num_data * (1 - 1e-9):  # not where hess_init was worked out, but for rounding
            raise ValueError(
                f"sigma {sigma:g} with hess_init {hess_init:g} means ess {ess:.3g}, less than num_data ({num_data:g}): "
                f"a posterior warmer than Bayes'. Leave hess_init out, or make it {precision / num_data:.2g} or less."
            )
    return LoraSettings(lr, ess, hess_init, BETA2 if beta2 is None else beta2)


def _number(value: SupportsFloat, name: str, wanted: str, least: float) -> float:
    """A setting as a Python number: NumPy's numbers and tensors of one are taken too."""
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):  # of tensors of several
        number = math.nan
    if not least <= number < math.inf:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return number


def _rate(steps: float, sigma: float, clip_radius: float) -> float:
    """The rate with which a linear schedule lets a weight go as far as it should."""
    return 2 * max(TRAVEL, TRAVEL_IN_SIGMAS * sigma) / (clip_radius * steps)
