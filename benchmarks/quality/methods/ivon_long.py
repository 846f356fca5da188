"""IVON with settings for a run that passes over its data many times: a wide posterior, which is hard to overfit."""

from __future__ import annotations

from benchmarks.quality.methods.ivon import IvonMean


class IvonLong(IvonMean):
    """Noise as large as what the weights move by (sigma 0.06), so that the mean has to lie in a wide valley.

    Settings from eight runs of 240 steps on the validation split of vader_nyt, in which AdamW becomes overconfident;
    too much noise for 60 steps. Nothing is chosen for any other task.
    """

    title = "IVON, many epochs: mean"
    source = "benchmarks/quality/README.md"
    candidates = ({"lr": 1.0, "ess": 6.9e3, "hess_init": 0.04, "beta2": 0.999},)
