"""AdamW: what most people use; one set of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.job import Job
from benchmarks.quality.method import Hyper, Method, State


class AdamW(Method):
    """Finetuning with AdamW, and prediction with what it found."""

    title = "AdamW"
    source = "Loshchilov and Hutter, ICLR 2019"
    candidates = ({"lr": 4e-3}, {"lr": 2e-3}, {"lr": 8e-3}, {"lr": 1e-3})

    def train(self, job: Job, hyper: Hyper) -> State:
        """The job's steps, with a rate that falls linearly to zero."""
        job.finetune(optimizer(job, hyper))
        return {}

    def predict(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        """By the weights as they are."""
        return job.logits(examples).softmax(1)


def optimizer(job: Job, hyper: Hyper) -> torch.optim.AdamW:
    """AdamW of the job's parameters, as every method here uses it that needs one."""
    return torch.optim.AdamW(job.parameters, lr=hyper["lr"], weight_decay=0.0, fused=job.device.type in ("cpu", "cuda"))
