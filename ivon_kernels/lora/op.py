"""The operation that all backends implement: the low-rank products of several samples, each on its own rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ivon_kernels.lora import cpu, reference, triton
from ivon_kernels.lora.factor import DTYPES, Factor
from ivon_kernels.noise import check_sample

__all__ = ["BACKENDS", "DTYPES", "Factor", "lora_samples_"]


class _Backend(Protocol):
    def unsupported(self, out: Tensor, x: Tensor, a: Factor, b: Factor) -> str | None: ...

    def lora_samples_(
        self, out: Tensor, x: Tensor, a: Factor, b: Factor, scaling: float, seed: int, samples: Sequence[int]
    ) -> None: ...


BACKENDS: dict[str, _Backend] = {"cpu": cpu, "triton": triton, "reference": reference}  # fastest first


def lora_samples_(
    out: Tensor,
    x: Tensor,
    a: Factor,
    b: Factor,
    *,
    scaling: float,
    seed: int,
    samples: Sequence[int],
    backend: str | None = None,
) -> Tensor:
    """Add the low-rank products of S samples: ``out[s] += scaling (x[s] A_s^T) B_s^T`` for s in 0 .. S - 1.

    ``A_s = round(mean + eps / inv_sigma)`` elementwise, with the normals eps of evaluation sample ``samples[s]``
    (:mod:`ivon_kernels.noise`, step ``EVAL_STEP``), has the bits that ``sampled_params(sample=...)`` puts into the
    weights; likewise B_s. Compiled backends accumulate in float32 and round once, when they add to `out`.

    Args:
        out: float32, bfloat16 or float16 ``[S * tokens, d_out]``, contiguous; all tokens of the first sample come
            first. Changed in place.
        x: ``[S * tokens, d_in]``, likewise.
        a: ``[rank, d_in]``.
        b: ``[d_out, rank]``.
        scaling: Of the product.
        seed: 64-bit seed of the noise.
        samples: Numbers of the samples, each as :func:`ivon_kernels.noise.check_sample` takes it.
        backend: ``"cpu"``, ``"triton"`` or ``"reference"``; None takes the first one that takes these tensors. One
            asked for by name never falls back to another.

    Returns:
        `out`.

    Raises:
        ValueError: If shapes, dtypes, layouts or devices do not fit together, a number is out of range, or backend
            `backend` does not exist or does not take these tensors.
    """
    _check(out, x, a, b, seed, samples)
    _choose(backend, out, x, a, b).lora_samples_(out, x, a, b, scaling, seed, samples)
    return out


def _choose(name: str | None, out: Tensor, x: Tensor, a: Factor, b: Factor) -> _Backend:
    if name is None:
        # On the CPU, triton would be its interpreter: only for those who ask.
        modules = (module for key, module in BACKENDS.items() if key != "triton" or out.device.type != "cpu")
        return next(module for module in modules if module.unsupported(out, x, a, b) is None)
    if name not in BACKENDS:
        raise ValueError(f"there is no backend {name!r}; choose one of {', '.join(BACKENDS)}, or None for the fastest")
    module = BACKENDS[name]
    if reason := module.unsupported(out, x, a, b):
        raise ValueError(f"backend {name!r} cannot be used: {reason}; backend=None picks one that can")
    return module


def _check(out: Tensor, x: Tensor, a: Factor, b: Factor, seed: int, samples: Sequence[int]) -> None:
    if not (out.dim() == x.dim() == a.mean.dim() == b.mean.dim() == 2):
        raise ValueError(
            "out, x, a and b must be matrices, not " + ", ".join(str(tuple(t.shape)) for t in (out, x, a.mean, b.mean))
        )
    (rows, d_out), (rank, d_in) = out.shape, a.mean.shape
    if x.shape != (rows, d_in) or b.mean.shape != (d_out, rank):
        raise ValueError(
            f"shapes do not fit together: out {tuple(out.shape)}, x {tuple(x.shape)}, a {tuple(a.mean.shape)} must be "
            f"[rank, d_in], b {tuple(b.mean.shape)} must be [d_out, rank]"
        )
    if not samples or rows % len(samples):
        raise ValueError(f"{rows} rows cannot be divided among {len(samples)} samples")
    for sample in (min(samples), max(samples)):
        check_sample(sample)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed} is outside [0, 2^64)")
    for name, dtype in (("out", out.dtype), ("x", x.dtype), ("a", a.dtype), ("b", b.dtype)):
        if dtype not in DTYPES:
            raise ValueError(f"{name} is {dtype}; it must be one of {', '.join(map(str, DTYPES))}")
    for name, factor in (("a", a), ("b", b)):
        if factor.inv_sigma.shape != factor.mean.shape:
            raise ValueError(f"{name}: inv_sigma {tuple(factor.inv_sigma.shape)} must have the shape of the mean")
        if not factor.mean.dtype == factor.inv_sigma.dtype == torch.float32:
            raise ValueError(f"{name}: mean and inv_sigma must be float32")
    tensors = (out, x, a.mean, a.inv_sigma, b.mean, b.inv_sigma)
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError("out, x, and the mean and inv_sigma of a and b must be contiguous")
    if any(tensor.device != out.device for tensor in tensors):
        raise ValueError(f"the tensors are on different devices: {', '.join(str(t.device) for t in tensors)}")
