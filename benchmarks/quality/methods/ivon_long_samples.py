"""IVON with settings for many epochs, with predictions averaged over samples of its wide posterior."""

from __future__ import annotations

from benchmarks.quality.methods.ivon_samples import IvonSamples


class IvonLongSamples(IvonSamples):
    """The posterior as it is."""

    title = "IVON, many epochs: samples"
    base = "ivon_long"
