"""Temperature scaling of IVON: samples are averaged first, and then one number divides the logs of the average."""

from __future__ import annotations

from torch import Tensor

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.job import Job
from benchmarks.quality.method import Hyper, Method, State
from benchmarks.quality.methods._ivon import posterior_of, predict
from ivon_kernels.posterior import fit_temperature, scale


class IvonSamplesScaled(Method):
    """What AdamW's temperature scaling does, done to averaged predictions; it changes no predicted class."""

    title = "IVON, scaled samples"
    source = "Rahaman and Thiery, NeurIPS 2021, arXiv 2007.08792 (pool, then calibrate)"
    base = "ivon"

    def tune(self, job: Job, state: State, hyper: Hyper, validation: EncodedExamples) -> Hyper:
        """Fits the temperature instead of choosing among dials."""
        return {"temperature": fit_temperature(self._logs(job, state, hyper, validation), validation.labels)}

    def predict(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        """Averaged over the job's samples, several in a pass."""
        return scale(self._logs(job, state, hyper, examples), hyper["temperature"])

    @staticmethod
    def _logs(job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        return predict(job, posterior_of(job, state, hyper), examples, job.samples).log()
