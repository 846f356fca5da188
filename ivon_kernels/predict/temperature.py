"""Temperature scaling: one number, fitted on a validation split, that all logits are divided by."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from ivon_kernels.predict.metrics import checked_labels

__all__ = ["best_temperature", "fit_temperature", "say_if_at_limit", "scale"]

LIMIT = 20.0
"""Largest temperature, and largest inverse one: logits that are right, or wrong, about every label have none."""


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that minimises the negative log-likelihood (Guo et al., ICML 2017, section 4.2).

    For predictions that average samples, give the logarithms of the averaged probabilities: to average first and scale
    then is better than the other order (Rahaman and Thiery, NeurIPS 2021, arXiv 2007.08792).

    Args:
        logits: ``[N, C]`` of a validation split, up to a constant for each row; any floating dtype and device.
        labels: The right classes, integers ``[N]``.

    Returns:
        From 1/20 to 20: above 1 where the predictions are too sure.

    Raises:
        ValueError: If a shape or a label is wrong, a logit is nan or +inf, or a row is -inf in every class.

    Warns:
        UserWarning: If it is 1/20 or 20, for then these labels do not tell how sure to be of new data.
    """
    found = best_temperature(logits, labels)
    say_if_at_limit(found, logits, labels, stacklevel=3)
    return found


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """As :func:`fit_temperature`, without its warning: for programs that fit many, and show each one."""
    # Finite also where a probability is 0, so that every class has a gradient.
    logs = _checked(logits).log_softmax(1).clamp_min(math.log(torch.finfo(torch.float64).tiny))
    labels = checked_labels(labels, *logs.shape)
    # The cost is convex in it.
    inverse = torch.ones((), dtype=torch.float64, device=logs.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([inverse], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def cost() -> Tensor:
        optimizer.zero_grad()
        found = nn.functional.cross_entropy(inverse * logs, labels)
        found.backward()
        return found

    optimizer.step(cost)
    return 1 / min(max(inverse.item(), 1 / LIMIT), LIMIT)


def say_if_at_limit(temperature: float, logits: Tensor, labels: Tensor, stacklevel: int) -> None:
    """The warning of :func:`fit_temperature`, with the stacklevel of ``warnings.warn`` seen from here."""
    if 1 / LIMIT < temperature < LIMIT:
        return
    right = int((logits.argmax(1).cpu() == labels.cpu()).sum())
    end, more = ("least", "less") if temperature < 1 else ("largest", "more")
    warnings.warn(
        f"the temperature is {temperature:g}, the {end} that is given: {len(labels)} labels, {right} of them "
        f"predicted, ask for {more}, and do not tell how sure to be of new data. Fit it to more examples, none "
        "of them trained on.",
        stacklevel=stacklevel,
    )


def scale(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities of logits that are divided by a temperature; no predicted class changes.

    Args:
        logits: As in :func:`fit_temperature`.
        temperature: Above 1 makes the predictions less sure.

    Returns:
        float64 ``[N, C]`` on the CPU.

    Raises:
        ValueError: If the temperature is not a finite number above 0, or the logits are as there.
    """
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0, got {temperature!r}")
    return (_checked(logits) / temperature).softmax(1)


def _checked(logits: Tensor) -> Tensor:
    """The logits as float64 on the CPU."""
    if logits.dim() != 2 or logits.shape[0] == 0 or logits.shape[1] < 2:
        raise ValueError(f"logits must be [rows, classes] of at least two classes, got {list(logits.shape)}")
    logits = logits.detach().to("cpu", torch.float64)
    if not logits.amax(1).isfinite().all():  # nan, too, is a maximum
        raise ValueError("logits must not be nan, +inf, or -inf in every class")
    return logits
