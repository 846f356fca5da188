"""What every backend of the LoRA operation reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DTYPES", "Factor"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of inputs, outputs and sampled weights."""


class Factor(NamedTuple):
    """The posterior of one LoRA matrix, as kernels read it."""

    mean: Tensor  # float32 [rows, columns], contiguous, on the device of x
    inv_sigma: Tensor  # likewise; 1 / sigma, inf where there is no noise
    index: int  # type: ignore[assignment]  # parameter index of its noise; hides tuple.index
    dtype: torch.dtype  # float32, bfloat16 or float16: each sampled weight is rounded to it
