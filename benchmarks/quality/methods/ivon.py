"""IVON, and prediction at the mean of the posterior that it found."""

from __future__ import annotations

from torch import Tensor

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.job import Job
from benchmarks.quality.method import Hyper, Method, State
from benchmarks.quality.methods._ivon import optimizer, state_of


class IvonMean(Method):
    """Finetuning with IVON; one pass at the mean costs what AdamW's prediction costs."""

    title = "IVON, mean"
    source = "Cong et al. 2024, arXiv 2411.04421; Shen et al., ICML 2024, arXiv 2402.17641"
    # The clip binds, so that a step is at most lr times its radius of 1e-3; the rest is as published.
    candidates = tuple({"lr": lr, "ess": 1e6, "hess_init": 1e-3} for lr in (1.0, 2.0, 4.0, 0.5))

    def train(self, job: Job, hyper: Hyper) -> State:
        """The job's steps, with a rate that falls linearly to zero."""
        found = optimizer(job, hyper)
        job.finetune(found)
        return state_of(found.posterior(job.model))

    def predict(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        """By the mean, which the weights hold."""
        return job.logits(examples).softmax(1)
