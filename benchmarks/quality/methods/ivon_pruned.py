"""IVON, at a mean without the weights that say least."""

from __future__ import annotations

from torch import Tensor

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.job import Job
from benchmarks.quality.method import Hyper, Method, State
from benchmarks.quality.methods._ivon import posterior_of, predict


class IvonPruned(Method):
    """Magnitude-to-sigma pruning: the given fraction of the weights with the smallest ``|mean| / sigma`` becomes 0."""

    title = "IVON, pruned mean"
    source = "arXiv 2506.14280"
    base = "ivon"
    dials = ({"pruned": 0.1}, {"pruned": 0.3}, {"pruned": 0.5}, {"pruned": 0.7})

    def predict(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        """At the mean of what is left."""
        return predict(job, posterior_of(job, state, hyper).pruned(hyper["pruned"]), examples, samples=0)
