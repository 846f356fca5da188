"""Does the Hessian matter? AdamW with the same Gaussian noise on all weights, in training and at prediction."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.job import Job
from benchmarks.quality.method import Hyper, Method, State
from benchmarks.quality.methods._adapter import PREDICTION, TRAINING, generator, holding, weights
from benchmarks.quality.methods.adamw import optimizer


class FixedNoise(Method):
    """Gradients at the noisy weights, steps from the mean, as IVON does it; but one variance for all, never learned."""

    title = "AdamW, fixed noise, samples"
    source = "an ablation: IVON's sampling with sigma given, and AdamW's steps"
    ablation = True
    candidates = (
        {"lr": 4e-3, "sigma": 0.01},
        {"lr": 4e-3, "sigma": 0.03},
        {"lr": 8e-3, "sigma": 0.01},
        {"lr": 2e-3, "sigma": 0.01},
    )

    def train(self, job: Job, hyper: Hyper) -> State:
        """AdamW's steps; a new sample for each."""
        noise = generator(job, TRAINING)
        job.finetune(optimizer(job, hyper), around=lambda: noisy(job, hyper["sigma"], noise))
        return {}

    def predict(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        """Averaged over the job's samples."""
        noise = generator(job, PREDICTION)
        return job.average(examples, lambda sample: noisy(job, hyper["sigma"], noise))


def noisy(job: Job, sigma: float, noise: torch.Generator) -> AbstractContextManager[None]:
    """A sample of a Gaussian around the adapter's weights, with the standard deviation `sigma`, for a block."""
    mean = weights(job)
    return holding(job, mean + sigma * torch.randn(mean.shape, generator=noise, device=mean.device))
