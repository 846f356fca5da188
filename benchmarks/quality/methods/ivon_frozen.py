"""Does the Hessian matter? IVON with its Hessian held where it started: every weight keeps the same variance."""

from __future__ import annotations

from torch import Tensor

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.job import Job
from benchmarks.quality.method import Hyper, Method, State
from benchmarks.quality.methods._ivon import optimizer, posterior_of, predict, state_of
from benchmarks.quality.methods.ivon import IvonMean

FROZEN = 1 - 2**-40
"""beta2: what a step adds to the Hessian is below its rounding error."""


class IvonFrozen(Method):
    """IVON whose Hessian never moves from `hess_init`; the same candidates as IVON's."""

    title = "IVON, Hessian frozen, samples"
    source = "beta2 so close to 1 that the Hessian is never updated"
    ablation = True
    candidates = IvonMean.candidates

    def train(self, job: Job, hyper: Hyper) -> State:
        """The job's steps, as IVON."""
        found = optimizer(job, {**hyper, "beta2": FROZEN})
        job.finetune(found)
        return state_of(found.posterior(job.model))

    def predict(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        """Averaged over the job's samples, several in a pass."""
        return predict(job, posterior_of(job, state, hyper), examples, job.samples)
