"""IVON, with predictions averaged over samples of the posterior."""

from __future__ import annotations

from torch import Tensor

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.job import Job
from benchmarks.quality.method import Hyper, Method, State
from benchmarks.quality.methods._ivon import posterior_of, predict


class IvonSamples(Method):
    """The posterior as it is."""

    title = "IVON, samples"
    source = "Cong et al. 2024, arXiv 2411.04421, section 3"
    base = "ivon"

    def predict(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        """Averaged over the job's samples, several in a pass."""
        return predict(job, posterior_of(job, state, hyper), examples, job.samples)
