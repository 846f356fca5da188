"""IVON with settings of the wide search in which its Hessian learns: an optimizer more than a posterior."""

from __future__ import annotations

from benchmarks.quality.methods.ivon import IvonMean


class IvonAdaptive(IvonMean):
    """Almost no noise and a small initial Hessian, which grows to each weight's scale of gradients, as in Adam.

    Settings from ``python -m benchmarks recipe`` on the validation split of vader_nyt: 45 trials instead of the four
    that every method may have. Nothing is chosen for any other task.
    """

    title = "IVON, recipe: mean"
    source = "benchmarks/results/recipe"
    candidates = ({"lr": 1.8, "ess": 3.2e8, "hess_init": 2.2e-4, "beta2": 0.999},)
