"""IVON with settings for many epochs, with samples of a posterior that is made colder or warmer after training."""

from __future__ import annotations

from benchmarks.quality.methods.ivon_tempered import IvonTempered


class IvonLongTempered(IvonTempered):
    """The posterior with every variance divided by a temperature."""

    title = "IVON, many epochs: tempered samples"
    base = "ivon_long"
