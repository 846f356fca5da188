"""IVON with settings of the wide search whose samples gain: trained with little noise, sampled with more."""

from __future__ import annotations

from torch import Tensor

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.job import Job
from benchmarks.quality.method import Hyper, State
from benchmarks.quality.methods.ivon import IvonMean
from benchmarks.quality.methods.ivon_tempered import IvonTempered


class IvonWarm(IvonMean):
    """A large initial Hessian, which bounds fewer steps, and samples of a posterior that is made warmer.

    Settings from ``python -m benchmarks recipe`` on the validation split of vader_nyt: 45 trials instead of the four
    that every method may have. Nothing but the temperature is chosen for any other task.
    """

    title = "IVON, recipe: tempered samples"
    source = "benchmarks/results/recipe"
    candidates = ({"lr": 1.5, "ess": 3.2e5, "hess_init": 0.04, "beta2": 0.999},)
    dials = IvonTempered.dials

    def predict(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        """As the tempered samples of IVON's other settings."""
        return IvonTempered().predict(job, state, hyper, examples)
