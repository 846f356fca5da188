"""Temperature scaling: AdamW, and one number that all logits are divided by."""

from __future__ import annotations

from torch import Tensor

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.job import Job
from benchmarks.quality.method import Hyper, Method, State
from ivon_kernels.posterior import fit_temperature, scale


class TemperatureScaling(Method):
    """One temperature, by the negative log-likelihood on the validation split; it changes no predicted class."""

    title = "AdamW, temperature scaling"
    source = "Guo et al., ICML 2017, section 4.2"
    base = "adamw"

    def tune(self, job: Job, state: State, hyper: Hyper, validation: EncodedExamples) -> Hyper:
        """Fits the temperature instead of choosing among dials."""
        return {"temperature": fit_temperature(job.logits(validation), validation.labels)}

    def predict(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        """By the weights as they are."""
        return scale(job.logits(examples), hyper["temperature"])
