"""Laplace-LoRA with a posterior over all LoRA weights."""

from __future__ import annotations

from benchmarks.quality.methods._laplace import Laplace


class LaplaceAll(Laplace):
    """The paper's LA: a covariance for the matrices of every LoRA layer."""

    title = "Laplace-LoRA, all layers"
    source = "Yang et al., ICLR 2024, arXiv 2308.13111"
    last_only = False
