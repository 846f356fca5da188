"""The bytes that an optimizer step must move through memory, per element: the one table, with its derivation.

An operation reads each of its inputs once and writes each of its outputs once; what a cache or a register holds between
two operations (two launches, two calls) is not counted on, what one launch holds is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Traffic(NamedTuple):
    """Values that one operation moves for every element of a parameter."""

    weights: int  # in the parameter's dtype
    grads: int  # in the gradient's dtype
    state: int  # in float32
    why: str
    quantized: int = 0  # of one byte


OPERATIONS = {
    "sample": Traffic(2, 0, 2, "read weight (was it edited?), mean, hess; write weight"),
    "sample, no check for edits": Traffic(1, 0, 2, "read mean, hess; write weight"),
    "restore": Traffic(1, 0, 1, "read mean; write weight"),
    "check": Traffic(0, 1, 0, "read grad (inf or nan?)"),
    "step": Traffic(1, 1, 6, "read grad, mean, momentum, hess; write mean, momentum, hess, weight"),
    "step and next sample": Traffic(1, 1, 6, "as step: the next sample comes from the new mean and hess in registers"),
    "write noise": Traffic(0, 0, 1, "the cpu backend keeps a training sample's noise: drawing it again takes longer"),
    "read noise": Traffic(0, 0, 1, "the cpu backend reads it again at the step"),
    "clear sums": Traffic(0, 0, 2, "several samples: write the sums of g and g * noise"),
    "accumulate": Traffic(0, 1, 4, "read grad and the two sums, write the sums"),
    "read sums": Traffic(0, 0, 2, "read the two sums"),
    "adamw": Traffic(6, 1, 0, "read weight, grad and two moments of the weight's dtype; write weight and moments"),
    "kahan": Traffic(2, 0, 0, "read and write a compensation of the weight's dtype (16 bit only)"),
    "adamw, 8-bit moments": Traffic(2, 1, 0, "read weight, grad and two bytes of moments; write weight and moments", 4),
}


def bytes_per_element(operations: tuple[str, ...], dtype: torch.dtype) -> int:
    """Bytes of the operations per element, with weights and gradients of `dtype`.

    Args:
        operations: Keys of :data:`OPERATIONS`.
        dtype: Of the parameters and of their gradients.
    """
    parts = [OPERATIONS[name] for name in operations if name != "kahan" or dtype.itemsize < 4]
    return sum(dtype.itemsize * (part.weights + part.grads) + 4 * part.state + part.quantized for part in parts)
