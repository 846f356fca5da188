"""Laplace-LoRA with a posterior over the LoRA weights of the last layer that has any."""

from __future__ import annotations

from benchmarks.quality.methods._laplace import Laplace


class LaplaceLast(Laplace):
    """The paper's LLLA: the other LoRA weights stay as AdamW left them, and no backward pass goes below the layer."""

    title = "Laplace-LoRA, last layer"
    source = "Yang et al., ICLR 2024, arXiv 2308.13111: LLLA"
    last_only = True
