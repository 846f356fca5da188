"""AdamW, and what needs nothing but weights that it has trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.method import PREDICTION, TRAINING, Hyper, Job, Method, State
from ivon_kernels.predict.temperature import best_temperature, scale

MEMBERS = 5  # of an ensemble, as in both papers; a job with fewer samples has as many members as samples
SPACING = 1000
"""Between the seeds of the members: more than there are seeds in a run, so that no two runs share a member."""
TEMPERATURE = "Guo et al., ICML 2017, section 4.2"


def optimizer(job: Job, hyper: Hyper) -> torch.optim.AdamW:
    """AdamW of the job's parameters, as every method here uses it that needs one."""
    return torch.optim.AdamW(job.parameters, lr=hyper["lr"], weight_decay=0.0, fused=job.device.type in ("cpu", "cuda"))


class AdamW(Method):
    """Finetuning with AdamW, the rate falling linearly to zero, and prediction with the weights that it found."""

    def train(self, job: Job, hyper: Hyper) -> State:
        job.finetune(optimizer(job, hyper))
        return {}


class TemperatureScaling(Method):
    """One temperature, by the negative log-likelihood on the validation split; it changes no predicted class."""

    def tune(self, job: Job, state: State, hyper: Hyper, validation: EncodedExamples) -> Hyper:
        return {"temperature": best_temperature(self.logs(job, state, hyper, validation), validation.labels)}

    def each(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        return scale(self.logs(job, state, hyper, examples), hyper["temperature"])[None]

    def logs(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        """What the temperature divides: logits, or the logs of probabilities."""
        return job.logits(examples)


class MCDropout(Method):
    """AdamW trains with a dropout of 0.1 on the adapter's inputs; a prediction averages over the masks of any rate."""

    sampling = True

    def each(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        with torch.random.fork_rng([job.device] if job.device.type == "cuda" else []):
            torch.manual_seed(job.seed)
            return job.each(examples, lambda: job.dropping_out(hyper["dropout"]))


class Ensemble(Method):
    """Adapters that are trained each from its own start. The first is AdamW's own; fitting trains the others."""

    def fit(self, job: Job, state: State, hyper: Hyper) -> State:
        first, others = job.weights(), []
        for member in range(1, min(job.samples, MEMBERS)):
            seed = job.seed + SPACING * member  # of its start, batches and dropout
            job.restart(seed)
            job.finetune(optimizer(job, hyper), seed=seed)
            others.append(job.weights())
        job.write(first)
        return {"members": torch.stack(others)} if others else {}

    def each(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        found = [job.logits(examples).softmax(1)]
        for member in state.get("members", ()):
            with job.holding(member.to(job.device)):
                found.append(job.logits(examples).softmax(1))
        return torch.stack(found)

    def work(self, samples: int) -> tuple[int, int]:
        members = min(samples, MEMBERS)
        return members - 1, members


class FixedNoise(Method):
    """Gradients at noisy weights, steps from the mean, as IVON does it; but one variance for all, never learned."""

    sampling = True

    def train(self, job: Job, hyper: Hyper) -> State:
        job.finetune(optimizer(job, hyper), around=noisy(job, hyper["sigma"], TRAINING))
        return {}

    def each(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        return job.each(examples, noisy(job, hyper["sigma"], PREDICTION))


def noisy(job: Job, sigma: float, stream: int) -> Callable[[], AbstractContextManager[None]]:
    """Blocks with samples of a Gaussian around the adapter's weights, of standard deviation `sigma`."""
    noise = job.generator(stream)

    def sampled() -> AbstractContextManager[None]:
        mean = job.weights()
        return job.holding(mean + sigma * torch.randn(mean.shape, generator=noise, device=mean.device))

    return sampled


METHODS = (
    AdamW(
        "adamw",
        "AdamW",
        "Loshchilov and Hutter, ICLR 2019",
        candidates=tuple({"lr": lr} for lr in (4e-3, 2e-3, 8e-3, 1e-3)),
        long_candidates=tuple({"lr": lr} for lr in (5e-4, 2.5e-4, 1e-3, 1e-4)),
    ),
    TemperatureScaling("temperature", "AdamW, temperature scaling", TEMPERATURE, base="adamw"),
    MCDropout(
        "mc_dropout",
        "MC dropout",
        "Gal and Ghahramani, ICML 2016, equation 6",
        base="adamw",
        dials=tuple({"dropout": rate} for rate in (0.1, 0.05, 0.2, 0.4)),
    ),
    Ensemble(
        "ensemble",
        "LoRA ensemble",
        "Wang et al. 2023, arXiv 2310.00035, section 3; Lakshminarayanan et al., NeurIPS 2017",
        base="adamw",
    ),
    FixedNoise(
        "fixed_noise",
        "AdamW, fixed noise, samples",
        "an ablation: IVON's sampling with sigma given, and AdamW's steps",
        ablation=True,
        candidates=tuple(
            {"lr": lr, "sigma": sigma} for lr, sigma in ((4e-3, 0.01), (4e-3, 0.03), (8e-3, 0.01), (2e-3, 0.01))
        ),
    ),
)
