"""IVON, with samples of a posterior that is made colder or warmer after training."""

from __future__ import annotations

from torch import Tensor

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.job import Job
from benchmarks.quality.method import Hyper, Method, State
from benchmarks.quality.methods._ivon import posterior_of, predict


class IvonTempered(Method):
    """The posterior with every variance divided by a temperature."""

    title = "IVON, tempered samples"
    source = "ivon_kernels.posterior.Posterior.tempered"
    base = "ivon"
    dials = ({"temperature": 1.0}, {"temperature": 0.3}, {"temperature": 0.1}, {"temperature": 3.0})

    def predict(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        """Averaged over the job's samples, several in a pass."""
        posterior = posterior_of(job, state, hyper).tempered(hyper["temperature"])
        return predict(job, posterior, examples, job.samples)
