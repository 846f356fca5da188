"""What the methods around IVON share: the optimizer, and its posterior as a state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.job import Job
from benchmarks.quality.method import Hyper, State
from ivon_kernels import IVON
from ivon_kernels.gaussians.gaussian import Gaussian
from ivon_kernels.gaussians.names import weight_names
from ivon_kernels.posterior import Posterior

STACKED_BATCH = 12
"""Examples of a forward pass that several samples share."""


def optimizer(job: Job, hyper: Hyper) -> IVON:
    """IVON of the job's parameters, with the paper's switches for LoRA; `hyper` may name any other setting."""
    settings: dict[str, Any] = {"clip_radius": 1e-3, "beta2": 0.99999, "weight_decay": 0.0, "rescale_lr": False}
    return IVON(job.parameters, seed=job.seed, **{**settings, **hyper})


def state_of(posterior: Posterior) -> State:
    """The Hessian of every weight: one extra number each. The mean is the adapter's weight."""
    return {name: gaussian.hess for name, gaussian in posterior.items()}


def posterior_of(job: Job, state: State, hyper: Hyper) -> Posterior:
    """The posterior around the weights that the model holds."""
    known = weight_names(job.model)
    number = {param: index for index, param in enumerate(job.parameters)}
    gaussians = {}
    for name, hess in state.items():
        param = known[name]
        mean = param.detach().float().clone()
        gaussians[name] = Gaussian(
            mean, hess.to(param.device), number[param], hyper["ess"], hyper.get("weight_decay", 0.0)
        )
    return Posterior(gaussians, job.seed)


def predict(job: Job, posterior: Posterior, examples: EncodedExamples, samples: int) -> Tensor:
    """Class probabilities float64 ``[examples, classes]`` averaged over samples, or at the mean for 0 of them."""
    return predict_each(job, posterior, examples, samples).mean(0)


def predict_each(job: Job, posterior: Posterior, examples: EncodedExamples, samples: int) -> Tensor:
    """Class probabilities under every sample, or at the mean for 0: float64 ``[samples, examples, classes]``."""
    index: list[int] = []

    def inputs() -> Iterator[dict[str, Tensor]]:
        for batch in job.batches(examples, STACKED_BATCH):
            index.extend(batch.index)
            yield {"input_ids": batch.input_ids, "last": batch.last}

    def score(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return job.scorer.logits(inputs["input_ids"], inputs["last"])

    found = posterior.predict(
        job.model, inputs(), samples=samples, score=score, keep_samples=True, progress=False
    ).sample_probabilities
    assert found is not None
    job.passes += (max(samples, 1) - 1) * len(index)  # one for each is counted already
    return found[:, torch.tensor(index).argsort()]
