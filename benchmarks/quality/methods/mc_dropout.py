"""MC dropout: AdamW, with the dropout of the training left on at prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.job import Job
from benchmarks.quality.method import Hyper, Method, State
from benchmarks.quality.methods._adapter import dropping_out


class MCDropout(Method):
    """AdamW trains with a dropout of 0.1 on the adapter's inputs; a prediction averages over the masks of any rate."""

    title = "MC dropout"
    source = "Gal and Ghahramani, ICML 2016, equation 6"
    base = "adamw"
    dials = ({"dropout": 0.1}, {"dropout": 0.05}, {"dropout": 0.2}, {"dropout": 0.4})

    def predict(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        """Averaged over the job's samples."""
        with torch.random.fork_rng([job.device] if job.device.type == "cuda" else []):
            torch.manual_seed(job.seed)
            return job.average(examples, lambda sample: dropping_out(job, hyper["dropout"]))
