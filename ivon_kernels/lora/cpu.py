"""The C++ kernel (csrc/cpu/lora.cpp): weights are drawn tile by tile, S adapters never exist in memory.

A thread works through its share of the tokens of a sample: it draws some rows of ``A_s``, multiplies, draws the next,
then the same with ``B_s``. For that it keeps 0.75 MB, whatever the layer and the batch (more beyond rank 512, see
csrc/cpu/lora.h).
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ivon_kernels.backends import cpu
from ivon_kernels.backends.addresses import DTYPES
from ivon_kernels.lora.factor import Factor
from ivon_kernels.noise import EVAL_STEP

__all__ = ["lora_samples_", "unsupported"]


class _Factor(ctypes.Structure):
    """struct IvonFactor of csrc/cpu/ivon_cpu.h."""

    _fields_ = (
        ("mean", ctypes.c_void_p),
        ("inv_sigma", ctypes.c_void_p),
        ("index", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


class _Lora(ctypes.Structure):
    """struct IvonLora of csrc/cpu/ivon_cpu.h."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("out_dtype", ctypes.c_int64),
        ("x_dtype", ctypes.c_int64),
        ("a", _Factor),
        ("b", _Factor),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("samples", ctypes.c_void_p),
        ("sample_count", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("step", ctypes.c_int64),
        ("scaling", ctypes.c_double),
        ("threads", ctypes.c_int64),
    )


def unsupported(out: Tensor, x: Tensor, a: Factor, b: Factor) -> str | None:
    """Why the kernel cannot take these tensors, or None."""
    reason = cpu.missing()
    if reason is not None:
        return reason
    for name, tensor in (("out", out), ("x", x)):
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}; it takes {', '.join(map(str, DTYPES))}"
    for name, factor in (("A", a), ("B", b)):
        if factor.dtype not in DTYPES:
            return f"the weights of {name} are {factor.dtype}; it takes {', '.join(map(str, DTYPES))}"
        for part, tensor in (("mean", factor.mean), ("inv_sigma", factor.inv_sigma)):
            if tensor.dtype != torch.float32:
                return f"the {part} of {name} is {tensor.dtype}; it takes torch.float32"
    for tensor in (out, x, a.mean, a.inv_sigma, b.mean, b.inv_sigma):
        if tensor.device.type != "cpu":
            return f"it takes tensors on the CPU, not on {tensor.device}"
        if not tensor.is_contiguous():
            return "it takes contiguous tensors"
    return None


def lora_samples_(
    out: Tensor, x: Tensor, a: Factor, b: Factor, scaling: float, seed: int, samples: Sequence[int]
) -> None:
    """``out[s] += scaling (x[s] A_s^T) B_s^T`` in float32, rounded once; results do not depend on the threads.

    Args:
        out: ``[S * tokens, d_out]``; written in place.
        x: ``[S * tokens, d_in]``, sample-major like ``out``.
        a: The posterior of ``A`` ``[r, d_in]``.
        b: The posterior of ``B`` ``[d_out, r]``.
        scaling: The adapter's.
        seed: The noise's, in ``[0, 2^64)``.
        samples: The S sample numbers.

    Shapes and numbers are those that :func:`ivon_kernels.lora.op.lora_samples_` has checked: the kernel gets addresses.
    """
    numbers = array("q", samples)
    call = _Lora(
        out.data_ptr(),
        x.data_ptr(),
        DTYPES[out.dtype],
        DTYPES[x.dtype],
        _Factor(a.mean.data_ptr(), a.inv_sigma.data_ptr(), a.index, DTYPES[a.dtype]),
        _Factor(b.mean.data_ptr(), b.inv_sigma.data_ptr(), b.index, DTYPES[b.dtype]),
        x.shape[-1],
        out.shape[-1],
        a.mean.shape[0],
        x.shape[0] // len(numbers) if numbers else 0,
        numbers.buffer_info()[0],
        len(numbers),
        seed,
        EVAL_STEP,
        scaling,
        torch.get_num_threads(),
    )
    cpu.library().ivon_cpu_lora(ctypes.byref(call))
