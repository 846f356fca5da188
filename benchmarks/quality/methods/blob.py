"""BLoB: LoRA's A has a Gaussian posterior, trained by backpropagation; B has a single value."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from benchmarks.finetune.data import EncodedExamples
from benchmarks.finetune.train import linear
from benchmarks.quality.method import PREDICTION, TRAINING, Hyper, Job, Method, State
from benchmarks.quality.methods.adamw import optimizer

PRIOR_SIGMA = 0.2  # standard deviation of A's prior, as in the published runs


class Blob(Method):
    """A is ``N(M, diag(G^2)^2)``; AdamW follows the likelihood, and `kl_lr` sets how fast both follow the prior.

    Both rates fall linearly to zero; the state is G of every A; a sample has the same A for all examples. Published:
    `lr` 1e-4, `kl_lr` 0.01 and `spread` 0.05 for 5000 steps of batch 4 on Llama-2-7B, without dropout.
    """

    sampling = True

    def train(self, job: Job, hyper: Hyper) -> State:
        noise, spread = job.generator(TRAINING), hyper["spread"]
        roots = {  # uniform at the start, as in the paper
            name: nn.Parameter(torch.empty_like(layer.weight).uniform_(spread / math.sqrt(2), spread, generator=noise))
            for name, layer in layers(job).items()
        }
        adamw = optimizer(job, hyper)
        adamw.add_param_group({"params": list(roots.values())})
        period = kl_period(job)

        def after_step(steps: int) -> None:
            done = steps - 1
            rate = hyper["kl_lr"] * linear(done, job.steps)
            follow_prior(job, roots, rate * kl_weight(done % period, period))

        with job.dropping_out(0.0), flipout(job, roots, noise):
            job.finetune(adamw, after_step=after_step)
        return {name: root.detach().clone() for name, root in roots.items()}

    def each(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        noise = job.generator(PREDICTION)
        return job.each(examples, lambda: sampled(job, state, noise))


def layers(job: Job) -> dict[str, nn.Linear]:
    """The A of every adapted layer, by the layer's name."""
    adapted = ((name, module) for name, module in job.model.named_modules() if isinstance(module, LoraLayer))
    return {name: cast("nn.Linear", module.lora_A["default"]) for name, module in adapted}


@contextmanager
def flipout(job: Job, roots: Mapping[str, Tensor], noise: torch.Generator) -> Iterator[None]:
    """Every forward pass inside the block draws A, with independent signs for each example (Flipout)."""

    def add_noise(root: Tensor, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + flipout_noise(inputs[0], root.square(), noise)

    with ExitStack() as stack:
        for name, layer in layers(job).items():
            stack.enter_context(layer.register_forward_hook(partial(add_noise, roots[name])))
        yield


def flipout_noise(x: Tensor, sigma: Tensor, noise: torch.Generator) -> Tensor:
    """``t * ((s * x) (sigma * E)^T)``: what noise on a linear layer's weight adds to its output.

    The normals E ``[out, in]`` are shared by all examples, the signs s and t are each example's own, the same for all
    of its tokens: an example sees one draw of the weight, and two examples' draws are uncorrelated.
    """
    rows, between = x.shape[0], (1,) * (x.dim() - 2)
    normals = torch.randn(sigma.shape, generator=noise, device=x.device, dtype=sigma.dtype)
    sign_in, sign_out = (_signs((rows, *between, size), noise, x) for size in reversed(sigma.shape))
    return nn.functional.linear(x * sign_in, sigma * normals) * sign_out


def _signs(shape: tuple[int, ...], noise: torch.Generator, like: Tensor) -> Tensor:
    return torch.randint(2, shape, generator=noise, device=like.device).to(like.dtype) * 2 - 1


def kl_period(job: Job) -> int:
    """Mini-batches of a period M of the prior's weights: an epoch, but at most half of the run.

    Nearly all of a period's weight is on its last batches: a run that ends before them would know no prior.
    """
    return max(min(math.ceil(len(job.training_set) / job.batch_size), job.steps // 2), 1)


def kl_weight(index: int, period: int) -> float:
    """``2^i / (2^M - 1)`` for mini-batch ``i`` from 0 to ``M - 1`` of a period; a period's weights add up to 1."""
    return 2.0 ** (index - period) / (1 - 2.0**-period)


@torch.no_grad()
def follow_prior(job: Job, roots: Mapping[str, Tensor], time: float) -> None:
    """Moves every mean M and every G along the gradient of the KL divergence from the prior, for a time.

    The divergence of A is that of the whole weight from the paper's low-rank prior. The published code takes SGD steps
    along it, which go far too far where G is small, for the slope is ``-2 / G``. Here the same flow is solved exactly:
    ``dM/dt = -M / p^2`` and, for ``sigma = G^2``, ``dsigma/dt = 4 (1 - sigma^2 / p^2)``, with the prior's `p`.
    """
    toward = math.tanh(4 * time / PRIOR_SIGMA)
    for name, layer in layers(job).items():
        layer.weight.mul_(math.exp(-time / PRIOR_SIGMA**2))
        ratio = roots[name].square() / PRIOR_SIGMA
        sigma = PRIOR_SIGMA * (ratio + toward) / (1 + ratio * toward)
        roots[name].copy_(sigma.sqrt().copysign(roots[name]))


@contextmanager
def sampled(job: Job, roots: State, noise: torch.Generator) -> Iterator[None]:
    """Every A is a draw from its posterior inside the block, and the mean again after it."""
    mean = job.weights()
    try:
        with torch.no_grad():
            for name, layer in layers(job).items():
                sigma = roots[name].to(job.device).square()
                layer.weight.add_(sigma * torch.randn(sigma.shape, generator=noise, device=sigma.device))
        yield
    finally:
        job.write(mean)


METHODS = (
    Blob(
        "blob",
        "BLoB",
        "Wang et al., NeurIPS 2024, arXiv 2406.11675, section 3",
        candidates=tuple(
            {"lr": lr, "kl_lr": kl_lr, "spread": 0.05}
            for lr, kl_lr in ((4e-3, 0.003), (4e-3, 0.01), (8e-3, 0.003), (2e-3, 0.003))
        ),
        long_candidates=tuple(
            {"lr": lr, "kl_lr": kl_lr, "spread": 0.05}
            for lr, kl_lr in ((1e-3, 0.003), (1e-3, 0.01), (2e-3, 0.003), (5e-4, 0.003))
        ),
    ),
)
