"""The bytes that an optimizer step must move through device memory, per element: the one table, with its derivation.

An operation reads each of its inputs once and writes each of its outputs once; what a cache or a register holds between
two operations (two launches) is not counted on, what one launch holds is. Noise is drawn again and never stored.
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


OPERATIONS = {
    "sample": Traffic(2, 0, 2, "read weight (was it edited?), mean, hess; write weight"),
    "sample, no check for edits": Traffic(1, 0, 2, "read mean, hess; write weight"),
    "check": Traffic(0, 1, 0, "read grad (inf or nan?)"),
    "step": Traffic(1, 1, 6, "read grad, mean, momentum, hess; write mean, momentum, hess, weight"),
    "step and next sample": Traffic(1, 1, 6, "as step: the next sample comes from the new mean and hess in registers"),
    "adamw": Traffic(6, 1, 0, "read weight, grad and two moments of the weight's dtype; write weight and moments"),
    "kahan": Traffic(2, 0, 0, "read and write a compensation of the weight's dtype (16 bit only)"),
}


def bytes_per_element(operations: tuple[str, ...], dtype: torch.dtype) -> int:
    """Bytes of one optimizer step per element, with weights and gradients of `dtype`.

    Args:
        operations: Keys of :data:`OPERATIONS`.
        dtype: Of the parameters and of their gradients.
    """
    parts = [OPERATIONS[name] for name in operations if name != "kahan" or dtype.itemsize < 4]
    return sum(dtype.itemsize * (part.weights + part.grads) + 4 * part.state for part in parts)
