"""Temperature scaling: AdamW, and one number that all logits are divided by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.job import Job
from benchmarks.quality.method import Hyper, Method, State


class TemperatureScaling(Method):
    """One temperature, by the negative log-likelihood on the validation split; it changes no predicted class."""

    title = "AdamW, temperature scaling"
    source = "Guo et al., ICML 2017, section 4.2"
    base = "adamw"

    def tune(self, job: Job, state: State, hyper: Hyper, validation: EncodedExamples) -> Hyper:
        """Fits the temperature instead of choosing among dials."""
        return {"temperature": fitted_temperature(job.logits(validation), validation.labels)}

    def predict(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        """By the weights as they are."""
        return (job.logits(examples) / hyper["temperature"]).softmax(1)


LIMIT = 20.0
"""Largest temperature, and largest inverse one: logits that are right, or wrong, about every label have none."""


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that minimises the negative log-likelihood, from ``1 / LIMIT`` to ``LIMIT``.

    Args:
        logits: float64 ``[examples, classes]``.
        labels: int64 ``[examples]``.
    """
    inverse = torch.ones((), dtype=torch.float64, requires_grad=True)  # the cost is convex in it
    optimizer = torch.optim.LBFGS([inverse], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def cost() -> Tensor:
        optimizer.zero_grad()
        cost = nn.functional.cross_entropy(inverse * logits, labels)
        cost.backward()
        return cost

    optimizer.step(cost)
    return 1 / min(max(inverse.item(), 1 / LIMIT), LIMIT)
