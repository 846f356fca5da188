"""SWAG-LoRA: a Gaussian around the weights that training passes through at a constant rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.method import PREDICTION, Hyper, Job, Method, State
from benchmarks.quality.methods.adamw import optimizer

RANK = 5  # deviations kept, as in the published configuration (`swag_max_num_models` in fortuinlab/swag-lora)


class Swag(Method):
    """AdamW to the fraction `start` of the steps, then `swa_lr` and one collected iterate a step.

    The published runs collect once an epoch, after epochs at the usual rate. A laptop's run is a few epochs long. The
    adapter holds the mean of the collected iterates afterwards.
    """

    sampling = True

    def train(self, job: Job, hyper: Hyper) -> State:
        start = min(int(hyper["start"] * job.steps), job.steps - 1)
        low = hyper["swa_lr"] / hyper["lr"]
        moments = Moments()

        def schedule(step: int) -> float:
            return low if step >= start else 1 + (low - 1) * step / start

        def collect(steps: int) -> None:
            if steps > start:
                moments.add(job.weights())

        job.finetune(optimizer(job, hyper), schedule=schedule, after_step=collect)
        job.write(moments.mean)
        return moments.state()

    def each(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        mean, noise = job.weights(), job.generator(PREDICTION)
        state = {name: value.to(job.device) for name, value in state.items()}
        return job.each(examples, lambda: job.holding(mean + deviation(state, noise)))


class Moments:
    """Mean and variance of iterates, and the last of their deviations from the mean so far."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(())
        self._scatter = torch.zeros(())
        self._deviations: list[Tensor] = []

    def add(self, iterate: Tensor) -> None:
        """Takes in an iterate ``[weights]``; by Welford's updates, for a mean of squares would lose small variances."""
        self.count += 1
        before = iterate - self.mean
        self.mean = self.mean + before / self.count
        after = iterate - self.mean
        self._scatter = self._scatter + before * after
        self._deviations = [*self._deviations, after][-RANK:]

    def state(self) -> State:
        """``variance [weights]``, over the iterates' number, and ``deviations [at most RANK, weights]``."""
        return {"variance": self._scatter / self.count, "deviations": torch.stack(self._deviations)}


def deviation(state: State, noise: torch.Generator) -> Tensor:
    """A sample's distance from the mean, ``[weights]``: half its covariance is diagonal, half of low rank."""
    variance, deviations = state["variance"], state["deviations"]
    rank = len(deviations)
    diagonal = variance.sqrt() * torch.randn(variance.shape, generator=noise, device=variance.device)
    low_rank = torch.randn(rank, generator=noise, device=variance.device) @ deviations
    return (diagonal + low_rank / math.sqrt(max(rank - 1, 1))) / math.sqrt(2)


METHODS = (
    Swag(
        "swag",
        "SWAG-LoRA",
        "Onal et al. 2024, arXiv 2405.03425; Maddox et al., NeurIPS 2019, algorithm 1 and equation 1",
        candidates=tuple(
            {"lr": lr, "swa_lr": swa_lr, "start": start}
            for lr, swa_lr, start in ((4e-3, 1e-3, 0.5), (4e-3, 2e-3, 0.75), (8e-3, 1e-3, 0.75), (2e-3, 1e-3, 0.5))
        ),
        long_candidates=tuple(
            {"lr": lr, "swa_lr": swa_lr, "start": start}
            for lr, swa_lr, start in ((5e-4, 2.5e-4, 0.5), (1e-3, 5e-4, 0.5), (1e-3, 1e-3, 0.5), (2.5e-4, 1.25e-4, 0.5))
        ),
    ),
)
