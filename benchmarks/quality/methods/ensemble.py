"""An ensemble: several adapters, each trained from its own start; what most others are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.job import Job
from benchmarks.quality.method import Hyper, Method, State
from benchmarks.quality.methods._adapter import holding, weights, write
from benchmarks.quality.methods.adamw import optimizer

MEMBERS = 5
"""As in both papers; a job with fewer samples has as many members as samples."""
SPACING = 1000
"""Between the seeds of the members: more than there are seeds in a run, so that no two runs share a member."""


class Ensemble(Method):
    """The first member is AdamW's own; fitting trains the others, and its time holds their cost."""

    title = "LoRA ensemble"
    source = "Wang et al. 2023, arXiv 2310.00035, section 3; Lakshminarayanan et al., NeurIPS 2017"
    base = "adamw"

    def fit(self, job: Job, state: State, hyper: Hyper) -> State:
        """Trains the other members: their start, batches and dropout come from seeds of their own."""
        first, others = weights(job), []
        for member in range(1, min(job.samples, MEMBERS)):
            seed = job.seed + SPACING * member
            job.restart(seed)
            job.finetune(optimizer(job, hyper), seed=seed)
            others.append(weights(job))
        write(job, first)
        return {"members": torch.stack(others)} if others else {}

    def predict(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        """Averaged over the members' probabilities."""
        total, members = job.logits(examples).softmax(1), 1
        for member in state.get("members", ()):
            with holding(job, member.to(job.device)):
                total = total + job.logits(examples).softmax(1)
            members += 1
        return total / members
