"""Settings under which the suite is run to find tests that ask more of matrix products than a machine promises.

Products have other bits on another CPU, with another number of threads, and for another number of rows. The variables
IVON_TEST_THREADS and IVON_TEST_SHAKE (CONTRIBUTING.md) bring such differences about on one machine.
"""

from __future__ import annotations

import os
import random
import warnings

import numpy as np
import torch
from torch import Tensor

THREADS = int(os.environ.get("IVON_TEST_THREADS", "1"))
SHAKE = os.environ.get("IVON_TEST_SHAKE", "")

_overrides: list[torch.library.Library] = []  # they end with the object


def start() -> None:
    """Do in this process what the variables say."""
    torch.set_num_threads(THREADS)
    if SHAKE and not _overrides:
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel of torch's own is overridden
            library.impl("mm", _mm, "CPU")
            library.impl("bmm", _mm, "CPU")
            library.impl("addmm", _addmm, "CPU")
            library.impl("baddbmm", _addmm, "CPU")
        _overrides.append(library)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """The product, its terms summed in an order that the shapes and IVON_TEST_SHAKE choose: equal calls, equal bits."""
    size = a.shape[-1]
    order = list(range(size))
    random.Random(f"{SHAKE} {tuple(a.shape)} {tuple(b.shape)}").shuffle(order)
    wide = torch.float32 if a.dtype in (torch.bfloat16, torch.float16) else a.dtype  # NumPy has no products of these
    left, right = (t.detach().to(wide).resolve_conj().clone().numpy() for t in (a, b))  # FSDP resizes its storages
    with np.errstate(all="ignore"):  # inf and NaN are what they are
        product = np.matmul(left[..., order], right[..., order, :])
    return torch.from_numpy(product).to(a.dtype)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = _mm(a, b)
    scaled = product if alpha == 1 else product * alpha
    return scaled if beta == 0 else scaled + (bias if beta == 1 else bias * beta)
