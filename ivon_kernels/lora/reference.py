"""The defining equations of :func:`ivon_kernels.lora.lora_samples_` in plain PyTorch, as PEFT computes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ivon_kernels import noise
from ivon_kernels.lora.factor import Factor

__all__ = ["lora_samples_", "sampled_weight", "unsupported"]


def sampled_weight(factor: Factor, seed: int, sample: int) -> Tensor:
    """One sample of a matrix: ``mean + eps / inv_sigma``, rounded to its dtype."""
    mean = factor.mean
    eps = noise.normals(
        mean.numel(), seed=seed, step=noise.EVAL_STEP, sample=sample, param=factor.index, device=mean.device
    )
    return (mean + eps.view(mean.shape) / factor.inv_sigma).to(factor.dtype)


def unsupported(out: Tensor, x: Tensor, a: Factor, b: Factor) -> str | None:
    """Why this backend does not take these tensors: it takes all."""
    return None


@torch.no_grad()
def lora_samples_(
    out: Tensor, x: Tensor, a: Factor, b: Factor, scaling: float, seed: int, samples: Sequence[int]
) -> None:
    """Two products for each sample, in the dtypes of the weights."""
    count, tokens = len(samples), out.shape[0] // len(samples)
    outs, xs = (t.view(count, tokens, t.shape[1]) for t in (out, x))
    for sample, out_s, x_s in zip(samples, outs, xs, strict=True):
        inner = functional.linear(x_s.to(a.dtype), sampled_weight(a, seed, sample))
        out_s += functional.linear(inner.to(b.dtype), sampled_weight(b, seed, sample)) * scaling
